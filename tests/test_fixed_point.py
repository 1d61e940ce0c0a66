from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jiio import Anderson, Broyden, ConvergenceWarning, NotConverged, Picard, Status, fixed_point


def rotation(factor: float):
    """s -> factor R s + b with R a quarter turn: |factor| >= 1 is no contraction, the fixed point is unique."""
    R = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - factor * R, b.T).T
    return (lambda s: factor * s @ R.T + b), exact


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
def test_acceleration_solves_a_rotation(solver) -> None:
    F, exact = rotation(1.5)
    solution = fixed_point(F, torch.zeros(2, 2, dtype=torch.float64), solver=solver, tol=1e-12)
    assert float((solution.value - exact).abs().max()) < 1e-8


def test_picard_reports_that_a_rotation_diverges() -> None:
    F, _ = rotation(1.5)
    with pytest.warns(ConvergenceWarning, match="2 DIVERGED.*Anderson"):
        solution = fixed_point(F, torch.zeros(2, 2, dtype=torch.float64), solver=Picard())
    assert (solution.status == Status.DIVERGED).all()
    assert bool(solution.value.isfinite().all())


def test_a_pure_rotation_stalls_without_acceleration() -> None:
    F, _ = rotation(1.0)
    solution = fixed_point(
        F, torch.zeros(2, 2, dtype=torch.float64), solver=Picard(), max_steps=200, on_failure="ignore"
    )
    assert (solution.status == Status.STALLED).all()


@pytest.mark.parametrize("steps", [4, 5, 6, 7])
def test_a_map_that_passes_zero_has_not_diverged(steps: int) -> None:
    """Every fourth value of this rotation is 0, at which a relative residual means nothing."""
    F, _ = rotation(1.0)
    start = torch.zeros(2, 2, dtype=torch.float64)
    solution = fixed_point(F, start, solver=Picard(), max_steps=steps, on_failure="ignore")
    assert (solution.status == Status.BUDGET).all()
    assert bool(solution.residual.isfinite().all())


def test_damping_solves_a_pure_rotation() -> None:
    F, exact = rotation(1.0)
    solution = fixed_point(
        F, torch.zeros(2, 2, dtype=torch.float64), solver=Picard(damping=0.5), max_steps=200, tol=1e-10
    )
    assert float((solution.value - exact).abs().max()) < 1e-8


def test_leaving_the_float_range_is_divergence_not_nan() -> None:
    def F(s: Tensor) -> Tensor:
        return s.square() * 1e6 + 1

    solution = fixed_point(F, torch.ones(2, 1), solver=Picard(), on_failure="ignore")
    assert (solution.status == Status.DIVERGED).all()


def test_a_tolerance_that_no_residual_meets_is_no_divergence() -> None:
    """Divided by it a residual leaves the float range."""
    solution = fixed_point(torch.cos, torch.ones(2, 1, dtype=torch.float64), tol=5e-324, on_failure="ignore")
    assert not bool((solution.status == Status.DIVERGED).any())
    assert float((solution.value.cos() - solution.value).abs().max()) < 1e-15


def test_nan_from_the_map_is_non_finite() -> None:
    def F(s: Tensor) -> Tensor:
        return torch.where(torch.arange(len(s))[:, None] == 1, torch.nan, s.cos())

    solution = fixed_point(F, torch.ones(3, 1), on_failure="ignore", max_steps=50)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]


def test_every_status_has_a_sentence() -> None:
    assert len({status.sentence for status in Status}) == len(Status) == 5


def test_trace_is_empty_unless_asked_for() -> None:
    assert fixed_point(torch.cos, torch.ones(2, 1)).trace == ()
    trace = fixed_point(torch.cos, torch.ones(2, 1), solver=Picard(), trace=True).trace
    assert trace[0].residual.shape == (2, 1)
    assert float(trace[-1].residual.max()) < float(trace[0].residual.max())


def test_report_names_counts_and_residuals() -> None:
    text = fixed_point(torch.cos, torch.ones(2, 1)).report()
    assert "2 of 2 samples converged" in text
    assert "residual s: median" in text
    assert "work a sample:" in text


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"F must return the shape.*\(2, 1\).*\(2, 3\)"):
        fixed_point(lambda s: s.expand(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match="tol must be positive, got -1"):
        fixed_point(torch.cos, torch.ones(2, 1), tol=-1)
    with pytest.raises(ValueError, match="a tree is a tensor or a tuple of trees, not list"):
        fixed_point(torch.cos, [torch.ones(2, 1)])
    with pytest.raises(ValueError, match="same batch"):
        fixed_point(lambda s: s, (torch.ones(2, 1), torch.ones(3, 1)))


def test_raise_carries_the_solution() -> None:
    with pytest.raises(NotConverged) as caught:
        fixed_point(torch.cos, torch.ones(2, 1), solver=Picard(), max_steps=3, on_failure="raise")
    assert caught.value.solution.status.tolist() == [Status.BUDGET] * 2
