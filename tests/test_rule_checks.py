"""Input rules that would find a wrong point, or do not fit x, are refused before the first step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from jiio import (
    LBFGS,
    PGD,
    Adam,
    Box,
    Constraint,
    Diagonal,
    Free,
    Intersection,
    L2Ball,
    LinfBall,
    Matrix,
    Normalized,
    Scalar,
    Sign,
    Simplex,
    Step,
    Switch,
    nested,
    solve,
)
from tests.problems import D, N, SmoothCell, smooth_problem, zeros

DOUBLE = torch.float64
CENTER = torch.zeros(3, D, dtype=DOUBLE)
BALL, CUBE, BOX = L2Ball(CENTER, 0.3), LinfBall(CENTER, 0.2), Box(-0.1, 0.3)


@pytest.mark.parametrize("constraint", [BALL, Simplex(), Intersection(BALL, BOX), Intersection(BOX, Simplex())])
@pytest.mark.parametrize("rule", [Sign(0.1), Diagonal(torch.ones(1, D, dtype=DOUBLE))], ids=["sign", "diagonal"])
def test_a_coordinate_wise_rule_is_refused_for_a_set_that_is_not(constraint: Constraint, rule) -> None:
    problem = smooth_problem(SmoothCell(), constraint=constraint)
    with pytest.raises(ValueError, match=r"does not commute with the projection onto (L2Ball|Simplex)"):
        solve(problem, zeros(problem), step=Step(rule))
    with pytest.raises(ValueError, match="does not commute"):
        nested(problem, zeros(problem), optimizer=PGD(rule), rounds=2)


@pytest.mark.parametrize(
    "optimizer, constraint",
    [(LBFGS(), BOX), (LBFGS(initial=Matrix(torch.eye(D, dtype=DOUBLE))), BALL), (Adam(), BALL), (Adam(), Simplex())],
    ids=["quasi-Newton in a box", "quasi-Newton in a ball", "Adam in a ball", "Adam in a simplex"],
)
def test_an_outer_optimiser_is_refused_where_projected_steps_stop_at_the_wrong_point(
    optimizer: Adam | LBFGS, constraint: Constraint
) -> None:
    """With its matrix L-BFGS was called converged in a box at twice the least cost."""
    problem = smooth_problem(SmoothCell(), constraint=constraint)
    with pytest.raises(ValueError, match=r"does not commute with the projection onto (Box|L2Ball|Simplex)"):
        nested(problem, zeros(problem), optimizer=optimizer, rounds=2)


def test_adam_may_be_used_in_a_box() -> None:
    problem = smooth_problem(SmoothCell(), constraint=BOX)
    reference = solve(problem, zeros(problem), step=Step(0.1), tol=1e-9, max_steps=4000)
    found = nested(problem, zeros(problem), optimizer=Adam(0.05), rounds=300, warm=True, solve_tol=1e-5)
    assert float((found.value.x - reference.value.x).abs().max()) < 0.01


@pytest.mark.parametrize("constraint", [BOX, CUBE, Intersection(CUBE, BOX), Intersection(Free(), BOX)])
def test_coordinate_wise_rules_find_the_minimum_in_boxes(constraint: Constraint) -> None:
    problem = smooth_problem(SmoothCell(), constraint=constraint)
    reference = solve(problem, zeros(problem), step=Step(0.1), tol=1e-9, max_steps=4000)
    diagonal = Diagonal(torch.tensor([[0.05, 0.1, 0.15]], dtype=DOUBLE), rate=1.0)
    found = solve(problem, zeros(problem), step=Step(diagonal), tol=1e-8, max_steps=4000)
    assert float((found.value.x - reference.value.x).abs().max()) < 1e-6
    sign = Step(Sign(0.02), schedule=lambda k: 0.98**k)
    found = solve(problem, zeros(problem), step=sign, max_steps=600, on_failure="ignore")
    assert float((found.value.x - reference.value.x).abs().max()) < 1e-2


def test_sign_steps_may_be_free() -> None:
    problem = smooth_problem(SmoothCell())
    step = Step(Sign(0.1), schedule=Switch(50, 0.1))
    assert bool(solve(problem, zeros(problem), step=step, max_steps=20, on_failure="ignore").value.x.isfinite().all())


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=DOUBLE)


ONE_FOR_ALL = {
    "rate": (Scalar(one(0.1)), Scalar(0.1)),
    "scale": (Scalar(0.5, scale=one(0.2)), Scalar(0.5, scale=0.2)),
    "rate without dimension": (Scalar(torch.tensor(0.1, dtype=DOUBLE)), Scalar(0.1)),
    "matrix": (
        Matrix(0.1 * torch.eye(D, dtype=DOUBLE)[None], rate=1.0),
        Matrix(0.1 * torch.eye(D, dtype=DOUBLE), rate=one(1.0)),
    ),
    "diagonal": (
        Diagonal(torch.full((1, D), 0.1, dtype=DOUBLE), one(1.0)),
        Diagonal(torch.full((16, D), 0.1, dtype=DOUBLE), 1.0),
    ),
}


@pytest.mark.parametrize("single, plain", ONE_FOR_ALL.values(), ids=ONE_FOR_ALL)
def test_one_entry_counts_for_all_samples_after_others_have_finished_too(single, plain) -> None:
    problem = smooth_problem(SmoothCell(), batch=16)
    rows: list[int] = []
    options = {"tol": 1e-7, "max_steps": 4000, "callback": lambda k, s, now: rows.append(len(s.x))}
    a, b = (solve(problem, zeros(problem), step=Step(rule), **options) for rule in (single, plain))
    assert min(rows) < 16
    assert torch.allclose(a.value.x, b.value.x, atol=1e-12)


def skewed() -> Tensor:
    matrix = torch.eye(D, dtype=DOUBLE)
    matrix[0, 1] = 0.5
    return matrix


def misfit(rule) -> Callable[[], object]:
    problem = smooth_problem(SmoothCell())
    return lambda: solve(problem, zeros(problem), step=rule if isinstance(rule, Step) else Step(rule))


WRONG = {
    "rates of another batch": (misfit(Scalar(torch.ones(2, dtype=DOUBLE))), r"rate.*\(3,\).*got \(2,\)"),
    "rates of two dimensions": (misfit(Normalized(torch.ones(3, 1, dtype=DOUBLE))), r"rate.*got \(3, 1\)"),
    "rates of another dtype": (misfit(Scalar(torch.ones(3))), "rate.*float64.*it has torch.float32"),
    "scales of another batch": (misfit(Scalar(0.1, torch.ones(4, dtype=DOUBLE))), r"scale.*got \(4,\)"),
    "scales of another dtype": (misfit(Scalar(0.1, torch.ones(1))), "scale.*it has torch.float32"),
    "matrices of another batch": (
        misfit(Matrix(torch.eye(D, dtype=DOUBLE).repeat(2, 1, 1))),
        r"each of 3 samples, or one; got \(2, 3, 3\)",
    ),
    "matrix of another dtype": (misfit(Matrix(torch.eye(D))), "matrix.*it has torch.float32"),
    "diagonal of another shape": (misfit(Diagonal(torch.ones(1, D + 1, dtype=DOUBLE))), r"\(3, 3\).*got \(1, 4\)"),
    "diagonal of another batch": (misfit(Diagonal(torch.ones(2, D, dtype=DOUBLE))), r"\(3, 3\).*got \(2, 3\)"),
    "diagonal of another dtype": (misfit(Diagonal(torch.ones(1, D))), "diagonal.*it has torch.float32"),
    "diagonal of a number": (lambda: Diagonal(torch.tensor(0.1)), "use Scalar"),
    "tangent of too many leaves": (
        misfit(Step(0.1, tangent=(torch.zeros(1, D, N, dtype=DOUBLE),) * 2)),
        "each of the 1 leaves of z, got 2",
    ),
    "skewed matrix": (lambda: Matrix(skewed()), r"must be symmetric.*0\.5 of the largest"),
    "one skewed matrix of two": (
        lambda: Matrix(torch.stack((torch.eye(D, dtype=DOUBLE), skewed()))),
        "must be symmetric",
    ),
    "negative matrix": (lambda: Matrix(-torch.eye(D)), "must be positive; its diagonal goes down to -1"),
    "zero matrix": (lambda: Matrix(torch.zeros(D, D)), "must be positive"),
    "negative scale": (lambda: Scalar(0.1, scale=-1.0), "scale of an input step must be positive, got -1.0"),
    "scale of 0": (lambda: Scalar(0.1, scale=0.0), "scale of an input step must be positive, got 0.0"),
    "negative scale of a sample": (lambda: Scalar(0.1, scale=torch.tensor([1.0, -1.0])), "scale.*positive"),
    "rate in a list": (lambda: Scalar([0.1, 0.2]), r"a number or a tensor.*\[0.1, 0.2\]"),  # type: ignore[arg-type]
    "tensor for a rule": (lambda: Step(torch.tensor(0.1)), r"Scalar\(rate\), got tensor\(0.1"),  # type: ignore[arg-type]
    "half for a rule": (lambda: Step(np.float16(0.5)), r"Scalar\(rate\), got"),  # type: ignore[arg-type]
    "class for a rule": (lambda: Step(Sign), r"Scalar\(rate\), got <class"),  # type: ignore[arg-type]
    "number for a step": (
        lambda: solve(smooth_problem(SmoothCell()), zeros(smooth_problem(SmoothCell())), step=0.1),  # type: ignore[arg-type]
        r"give the step as Step\(rate\) or None, got 0.1",
    ),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_a_rule_that_does_not_fit_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_measured_matrices_and_scales_need_not_be_finite() -> None:
    """One broken sample must not stop a solve that measures curvatures."""
    matrix = torch.eye(D, dtype=DOUBLE).repeat(2, 1, 1)
    for value in (torch.nan, torch.inf, -torch.inf):
        matrix[1, 0, 0] = value
        assert torch.equal(Matrix(matrix).inverse[0], matrix[0])
    Scalar(0.5, scale=torch.tensor([1.0, torch.nan, 0.0]))


def test_rounding_of_an_inverse_is_no_asymmetry() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    matrix = (vectors * torch.logspace(0, 4, 30)) @ vectors.T
    Matrix(torch.linalg.inv((matrix + matrix.T) / 2))
