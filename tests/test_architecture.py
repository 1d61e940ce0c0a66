"""The import graph points one way."""

from __future__ import annotations

import ast
from pathlib import Path

import jiio

ROOT = Path(jiio.__file__).parent
# A module may import only modules of earlier layers, and others of its own.
LAYERS = [
    {"tree", "autodiff", "schedule", "graph"},
    {"constraint", "krylov", "solver", "solution"},
    {"precondition", "intersection", "book", "accelerated"},
    {"fixed_point"},
    {"problem", "optimizer", "regularize", "input_memory", "step", "damped", "low_rank"},
    {"joint", "curvature", "cuda_graph"},
    {"automatic"},
    {"solve"},
    {"nested", "implicit"},
    {"deq"},
    {"models", "data"},
    {"tasks", "load"},
    {"app"},
]


def imports(path: Path) -> set[str]:
    """Names of the parts of jiio that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "jiio" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("jiio.")}
    return found


def parts() -> dict[str, set[str]]:
    """Part -> parts it imports."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        part = relative.parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            graph.setdefault(part, set()).update(imports(path) - {part})
    return graph


def test_imports_point_one_way() -> None:
    rank = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    graph = parts()
    assert set(graph) <= set(rank), f"give {set(graph) - set(rank)} a layer"
    wrong = [f"{a} imports {b}" for a, names in graph.items() for b in names if b in rank and rank[b] > rank[a]]
    assert not wrong


def test_models_and_tasks_do_not_import_each_other() -> None:
    graph = parts()
    assert "models" not in graph.get("tasks", set())
    assert "tasks" not in graph.get("models", set())


def test_nothing_imports_the_application() -> None:
    assert not [part for part, names in parts().items() if "app" in names]


def test_no_batch_norm_and_no_device_anywhere() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "BatchNorm" not in text and ".cuda()" not in text, path
