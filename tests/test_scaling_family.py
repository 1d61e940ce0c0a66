from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.synthetic import Cell, Family, make
from jiio import DEQ, Delayed, Step, gauss_newton, newton_step, solve

SMALL = Family(latent=8, state=128, batch=3)


@pytest.mark.parametrize("contraction", [0.5, 0.95])
def test_the_cell_has_the_contraction_that_was_asked_for(contraction: float) -> None:
    cell = Cell(replace(SMALL, contraction=contraction))
    W = cell.linear(torch.eye(SMALL.state))
    assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(contraction, rel=1e-5)
    z = 1e-4 * torch.linalg.eigh(W).eigenvectors[:, -1:].T
    x = torch.zeros(1, SMALL.latent)
    cell.b = torch.zeros_like(cell.b)
    moved = cell.f(z, x) - cell.f(0 * z, x)
    assert float(moved.norm() / z.norm()) == pytest.approx(contraction, rel=1e-3)


@pytest.mark.parametrize("contraction", [0.5, 0.95])
def test_the_problem_has_about_the_condition_that_was_asked_for(contraction: float) -> None:
    """At slopes between 0.8 and 1 within a factor, at unit slopes to the digit: near t = 0 they are 1."""
    family = replace(SMALL, contraction=contraction, condition=100.0)
    problem, start = make(family)
    z = DEQ(problem.f, tol=1e-5, max_steps=500)(start.x, start.z, *problem.context)
    values = torch.linalg.eigvalsh(gauss_newton(problem, z, start.x))
    condition = values[:, -1] / values[:, 0]
    assert bool((condition > 40).all()) and bool((condition < 250).all())


@pytest.mark.parametrize("hard", [{"contraction": 0.98}, {"condition": 1000.0}, {"latent": 128}], ids=str)
def test_with_the_model_s_tangent_a_hard_problem_takes_as_many_steps_as_an_easy_one(hard: dict[str, float]) -> None:
    def steps(family: Family, *, tangent: bool) -> float:
        problem, start = make(family)
        step = newton_step(problem, start)
        if not tangent:
            step = Step(step.x)  # the matrix alone, with the defaults that suit it
        solution = solve(problem, start, step=step, solver=Delayed(after=5), on_failure="ignore")
        assert bool(solution.converged.all()) or not tangent
        return float(solution.steps.double().mean())

    easy = Family(latent=16, batch=4, contraction=0.5)
    assert steps(replace(easy, **hard), tangent=True) < 3 * steps(easy, tangent=True)
    assert steps(replace(easy, **hard), tangent=True) < 0.7 * steps(replace(easy, **hard), tangent=False)
