"""Cells and costs of the packaged kinds of model compile without a graph break, as docs/choosing.md says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from jiio import Problem, State, tree
from tests.models.test_layout import adapted, classified, generated


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "made", [lambda: classified(8, 1), generated, adapted], ids=["attack", "latents", "adaptation"]
)
def test_f_and_cost_are_one_graph_each(made: Callable[[], tuple[Problem, State]]) -> None:
    """With the backend that needs no C++ compiler."""
    with torch.no_grad():
        problem, start = made()
    f, cost = (torch.compile(part, fullgraph=True, backend="aot_eager") for part in (problem.f, problem.cost))
    now, compiled = problem.sweep(start), replace(problem, f=f, cost=cost).sweep(start)
    for a, b in zip(tree.leaves(now), tree.leaves(compiled), strict=True):
        assert float((a - b).abs().max()) <= 1e-5
