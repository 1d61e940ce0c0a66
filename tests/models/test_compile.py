"""Problems of the packaged kinds of model compile without a graph break, as docs/choosing.md says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from jiio import Problem, State, Step, solve
from jiio import graph as graphs
from jiio.precondition import Normalized
from tests.models.test_layout import adapted, classified, generated


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "made, rule",
    [(lambda: classified(8, 1), Normalized(0.1)), (generated, 0.05), (adapted, 0.05)],
    ids=["attack", "latents", "adaptation"],
)
def test_a_step_without_a_graph_break(
    made: Callable[[], tuple[Problem, State]], rule: float | Normalized, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend that needs no C++ compiler."""
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    with torch.no_grad():
        problem, start = made()
    usual, compiled = (
        solve(problem, start, step=Step(rule), max_steps=5, on_failure="ignore", compiled=each)
        for each in (False, True)
    )
    assert float((usual.value.x - compiled.value.x).abs().max()) <= 1e-5
