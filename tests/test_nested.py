from __future__ import annotations

import pytest
import torch

from jiio import LBFGS, PGD, Adam, Box, L2Ball, Matrix, Normalized, Problem, Scalar, Status, Switch, nested, solve, tree
from tests.problems import D, SmoothCell, linear_quadratic, smooth_problem, zeros

OPTIMIZERS = {
    "adam": (Adam(0.2), 250, 1e-3),
    "gradient descent": (PGD(Scalar(0.3)), 200, 1e-4),
    "preconditioned": (PGD(Matrix(0.3 * torch.eye(D, dtype=torch.float64), rate=1.0)), 200, 1e-4),
    "lbfgs": (LBFGS(), 60, 1e-6),
    "preconditioned lbfgs": (LBFGS(initial=Scalar(1.0, scale=0.1)), 60, 1e-6),
}


@pytest.mark.parametrize("optimizer, rounds, accuracy", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_every_optimizer_reaches_the_closed_form(optimizer, rounds: int, accuracy: float, warm: bool) -> None:
    exact = linear_quadratic()
    # the best x is chosen by cost, whose error is the solves': an x to 1e-6 needs costs to its square
    tol = 0.1 * accuracy**2
    solution = nested(exact.problem(), exact.start(), optimizer=optimizer, rounds=rounds, warm=warm, solve_tol=tol)
    assert float((solution.value.x - exact.solution().x).abs().max()) < accuracy


def test_nested_and_joint_agree_on_a_nonlinear_problem() -> None:
    problem = smooth_problem(SmoothCell())
    joint = solve(problem, zeros(problem), tol=1e-8, max_steps=1000)
    baseline = nested(problem, joint.value, optimizer=LBFGS(), rounds=30, warm=True, solve_tol=1e-9)
    assert float((baseline.value.x - joint.value.x).abs().max()) < 1e-5


@pytest.mark.parametrize("optimizer", [Adam(0.05), LBFGS(), PGD(Scalar(0.1))], ids=["adam", "lbfgs", "pgd"])
def test_samples_are_independent(optimizer) -> None:
    problem = smooth_problem(SmoothCell(), batch=4)
    start = zeros(problem)
    together = nested(problem, start, optimizer=optimizer, rounds=15, solve_tol=1e-8)
    row = torch.tensor([2])
    alone = nested(problem.select(row), tree.select(start, row), optimizer=optimizer, rounds=15, solve_tol=1e-8)
    assert float((together.value.x[2] - alone.value.x[0]).abs().max()) < 1e-7


def test_projected_attack_ends_on_the_ball() -> None:
    ball = L2Ball(torch.zeros(3, D, dtype=torch.float64), 0.2)
    problem = smooth_problem(SmoothCell(), constraint=ball)
    attack = PGD(Normalized(0.1), schedule=Switch(20, 0.1))
    solution = nested(problem, zeros(problem), optimizer=attack, rounds=60, solve_tol=1e-6)
    reference = solve(problem, zeros(problem), tol=1e-6, max_steps=1000)
    assert bool(ball.contains(solution.value.x, 1e-6).all())
    assert bool((solution.cost <= reference.cost + 1e-3).all())


def test_work_counts_every_evaluation() -> None:
    """f and cost count their own calls; the solution's work is what they saw."""
    calls = {"f": 0}
    cell = SmoothCell()
    base = smooth_problem(cell)

    def f(z, x, y):
        calls["f"] += len(x)
        return cell.f(z, x)

    problem = Problem(f, base.cost, context=base.context)
    solution = nested(problem, zeros(problem), rounds=5, warm=True)
    measured = 3  # the final measurement of the residuals
    assert solution.work.f == calls["f"] - measured
    assert solution.work.cost_grad == 3 * (5 + 1)  # one a round, one for the slope at the start
    assert solution.work.vjp >= 3 * 5 * 2


def test_bad_input_is_named() -> None:
    problem = smooth_problem(SmoothCell())
    with pytest.raises(ValueError, match="rounds is a whole number and must be at least 1, got 0"):
        nested(problem, zeros(problem), rounds=0)
    with pytest.raises(ValueError, match="history must be at least 1, got 0"):
        LBFGS(history=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_whose_cost_is_not_finite_is_reported_and_feasible(value: float) -> None:
    odd, box = torch.tensor([0.0, value]), Box(0.0, 1.0)
    problem = Problem(
        lambda z, x, c: 0.5 * z + x, lambda z, x, c: (z - 1).square().sum(1) + c, box, context=(odd,)
    )  # its gradient is finite, and its minimum lies inside
    solution = nested(problem, problem.start(torch.full((2, 3), 5.0), torch.zeros(2, 3)), optimizer=Adam(0.1))
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert bool(box.contains(solution.value.x, 0.0).all())
