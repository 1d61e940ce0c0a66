from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from jiio import Accelerated, Anderson, Delayed, Picard, Problem, Step, solve

BATCH, N = 8, 5000
STATE = 4 * BATCH * (2 * N + 1)  # bytes of (z, mu, x) in float32
CASES = {
    "picard": (Picard(), 0),
    "anderson 5": (Anderson(5), 5),
    "anderson 10": (Anderson(10), 10),
    "delayed": (Delayed(Anderson(10), after=5), 10),
    "accelerated": (Delayed(Accelerated(Anderson(10)), after=3), 10),
}


def large_problem() -> Problem:
    """A state of which everything but z and mu is small."""
    target = torch.linspace(-1, 1, BATCH * N).view(BATCH, N)

    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(x.expand_as(z), z, torch.tensor(0.5))

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(1)

    return Problem(f, cost, context=(target,))


def states_held(problem: Problem, **options: Any) -> float:
    """The most that a solve allocates beyond what one evaluation of f and cost with its gradients does, in states."""
    start = problem.start(torch.ones(BATCH, 1), torch.zeros(BATCH, N))
    evaluation = peak_bytes(lambda: problem.sweep(start)) - STATE  # its result is a state of the solve
    most = peak_bytes(lambda: solve(problem, start, on_failure="ignore", **options))
    return (most - evaluation) / STATE


@pytest.mark.parametrize("solver, history", CASES.values(), ids=CASES)
@pytest.mark.parametrize("max_steps", [20, 60])
def test_a_solve_holds_at_most_six_states_beside_the_solver_s_history(solver, history: int, max_steps: int) -> None:
    """No sample converges: with 20 steps the budget ends, with 60 they stall, and z catches up in both."""
    held = states_held(large_problem(), step=Step(1e-7), solver=solver, max_steps=max_steps, tol=1e-12)
    assert held <= 6 + 2 * history


@pytest.mark.parametrize("solver, history", CASES.values(), ids=CASES)
def test_taking_out_finished_samples_copies_at_most_the_history(solver, history: int) -> None:
    """Samples converge at different steps; the rest of the batch and of the history goes on as a copy."""
    held = states_held(large_problem(), step=Step(2e-5), solver=solver, max_steps=300, tol=1e-4)
    assert held <= 6 + 3.5 * history


@pytest.mark.parametrize("latent", [8, 32])
def test_a_measured_step_holds_a_tangent_for_each_coordinate_and_little_else(latent: int) -> None:
    """An equilibrium, half a state, for each; columns of its products were kept beside it, four times as much in all."""
    U = torch.randn(N, latent, generator=torch.Generator().manual_seed(0))

    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + x @ U.T)

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(1) + x.square().sum(1)

    problem = Problem(f, cost, context=(torch.linspace(-1, 1, BATCH * N).view(BATCH, N),))
    start = problem.start(torch.zeros(BATCH, latent), torch.zeros(BATCH, N))
    held = peak_bytes(lambda: solve(problem, start, on_failure="ignore", max_steps=12)) / STATE
    assert held <= latent / 2 + 14
