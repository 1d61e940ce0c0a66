"""Solves of cells at contractions near 1, where z and mu arrive late."""

from __future__ import annotations

import pytest
import torch

from jiio import Problem, Step, solve


@pytest.mark.parametrize("step", [None, Step(0.05)], ids=["automatic", "scalar"])
def test_what_a_slow_cell_has_reached_is_not_lost_for_the_start(step: Step | None) -> None:
    """At a contraction of 0.99 z does not catch up by plain evaluations, and an iterate that can't be compared is not kept."""
    gain = torch.linspace(0.5, 0.99, 8, dtype=torch.float64)
    target = torch.ones(2, 8, dtype=torch.float64)
    problem = Problem(
        lambda z, x, y: gain * z + (1 - gain) * x, lambda z, x, y: (z - y).square().sum(1), context=(target,)
    )
    start = problem.start(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64))
    solution = solve(problem, start, step=step, max_steps=20, on_failure="ignore")
    reached = problem.cost(solution.value.x.expand(2, 8), solution.value.x, target)  # z* = x
    assert float(reached.max()) < 0.15 * 8  # which is that of the start


@pytest.mark.parametrize("slowest", [0.9, 0.95, 0.98])
def test_what_has_converged_slowly_is_not_given_up_for_an_earlier_iterate(slowest: float) -> None:
    """An earlier iterate whose z and mu lag, the slower the more, has a Lagrangian that looks better than its cost is."""
    share = torch.linspace(0.5, slowest, 8, dtype=torch.float64)
    problem = Problem(lambda z, x: share * z + (1 - share) * x, lambda z, x: (z - 1).square().sum(1))
    start = problem.start(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64))
    solution = solve(problem, start)
    assert bool(solution.converged.all())
    assert abs(float(solution.value.x) - 1) < 0.01
