"""Input steps: every rule reaches the same minimum, curvatures are right, unfit preconditioners are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jiio import (
    Anderson,
    Box,
    Diagonal,
    Falling,
    L2Ball,
    Matrix,
    Normalized,
    Picard,
    Problem,
    Scalar,
    State,
    Step,
    curvature,
    gauss_newton,
    inverse_of,
    newton_step,
    solve,
    tree,
)
from jiio.fixed_point import part_of
from tests.problems import D, N, SmoothCell, linear_quadratic, smooth_problem, zeros


def test_gauss_newton_matrix_of_a_linear_problem_is_its_reduced_hessian() -> None:
    exact = linear_quadratic()
    gain = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - exact.A, exact.B)
    hessian = gain.T @ exact.C.T @ exact.C @ gain + exact.prior * torch.eye(D, dtype=torch.float64)
    state = exact.solution()
    found = gauss_newton(exact.problem(), state.z, state.x)
    assert float((found - hessian).abs().max() / hessian.abs().max()) < 0.05
    largest = curvature(exact.problem(), exact.start().z, exact.start().x, steps=20)
    assert torch.allclose(largest, torch.linalg.matrix_norm(hessian, 2).expand(4), rtol=0.05)
    assert torch.allclose(inverse_of(hessian) @ hessian, torch.eye(D, dtype=torch.float64), atol=1e-8)


RULES = {
    "number": Step(0.1),
    "schedule": Step(0.1, schedule=lambda k: 0.5 if k > 200 else 1.0),
    "diagonal": Step(Diagonal(torch.full((1, D), 0.1, dtype=torch.float64), rate=1.0)),
    "matrix": Step(Matrix(0.1 * torch.eye(D, dtype=torch.float64), rate=1.0)),
    "per sample": Step(Scalar(torch.tensor([0.1, 0.05, 0.12], dtype=torch.float64))),
    "damped": Step(0.1, z=0.8, mu=0.6),
    "looking ahead": Step(0.1, lookahead=Falling(1.0, 0.0)),
}


@pytest.mark.parametrize("step", RULES.values(), ids=RULES)
def test_every_input_rule_reaches_the_same_minimum(step: Step) -> None:
    problem = smooth_problem(SmoothCell())
    solution = solve(problem, zeros(problem), step=step, tol=1e-7, max_steps=4000)
    reference = solve(problem, zeros(problem), tol=1e-9, max_steps=4000)
    assert float((solution.value.x - reference.value.x).abs().max()) < 1e-5


def test_a_normalised_step_solves_a_problem_with_an_active_ball() -> None:
    ball = L2Ball(torch.zeros(3, D, dtype=torch.float64), 0.2)
    problem = smooth_problem(SmoothCell(), constraint=ball)
    a = solve(problem, zeros(problem), step=Step(Normalized(0.03)), tol=1e-6, max_steps=2000)
    b = solve(problem, zeros(problem), step=Step(0.1), tol=1e-8, max_steps=4000)
    assert float((a.value.x - b.value.x).abs().max()) < 1e-5
    assert bool(ball.contains(a.value.x, 1e-6).all())


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e38])
def test_a_normalised_step_has_its_length_whatever_that_of_the_gradient(size: float) -> None:
    """The squares of small and of large numbers are 0 and infinite in single precision."""
    gradient = size * torch.tensor([[0.6, -0.8], [0.0, 0.0]])
    assert torch.allclose(Normalized(0.1).direction(gradient), torch.tensor([[0.6, -0.8], [0.0, 0.0]]))


def test_what_is_measured_against_a_size_beyond_all_floats_is_no_residual() -> None:
    size, difference = torch.tensor([torch.inf, 2.0]), torch.tensor([1.0, 1.0])
    assert part_of(size, difference).isnan().tolist() == [True, False]


def test_a_preconditioner_that_does_not_commute_with_the_constraint_is_refused() -> None:
    ball = smooth_problem(SmoothCell(), constraint=L2Ball(torch.zeros(3, D, dtype=torch.float64), 0.3))
    box = smooth_problem(SmoothCell(), constraint=Box(-0.1, 0.1))
    matrix, diagonal = Matrix(torch.eye(D, dtype=torch.float64)), Diagonal(torch.ones(1, D, dtype=torch.float64))
    for problem, rule in ((ball, matrix), (ball, diagonal), (box, matrix)):
        with pytest.raises(ValueError, match="does not commute"):
            solve(problem, zeros(problem), step=Step(rule))
    solve(box, zeros(box), step=Step(Diagonal(torch.full((1, D), 0.1, dtype=torch.float64), rate=1.0)), max_steps=1000)


@pytest.mark.parametrize("solver", [Picard(), Anderson(3)], ids=["picard", "anderson"])
def test_a_tangent_leaves_the_minimum_where_it_is(solver) -> None:
    """A wrong one too: at a fixed point nothing moves."""
    problem = smooth_problem(SmoothCell())
    reference = solve(problem, zeros(problem), tol=1e-9, max_steps=4000)
    step = replace(newton_step(problem, zeros(problem)), lag=None)
    for scale in (1.0, 0.5):
        tilted = replace(step, tangent=scale * step.tangent)
        found = solve(problem, zeros(problem), step=tilted, solver=solver, tol=1e-8, max_steps=2000)
        assert float((found.value.x - reference.value.x).abs().max()) < 1e-6


def test_a_sample_s_own_tangent_goes_with_it_when_others_finish() -> None:
    problem = smooth_problem(SmoothCell())
    start = zeros(problem)
    rows = [torch.tensor([i]) for i in range(3)]
    steps = [newton_step(problem.select(row), State(start.z[row], start.mu[row], start.x[row])) for row in rows]
    inverse = inverse_of(gauss_newton(problem, start.z, start.x))
    steps = [replace(step, x=Matrix(one)) for step, one in zip(steps, inverse, strict=True)]
    together = replace(steps[0], x=Matrix(inverse), tangent=torch.cat([step.tangent for step in steps]))
    both = solve(problem, start, step=together, tol=1e-6, max_steps=1000)
    for i, row in enumerate(rows):
        alone = solve(
            problem.select(row),
            State(start.z[row], start.mu[row], start.x[row]),
            step=steps[i],
            tol=1e-6,
            max_steps=1000,
        )
        assert torch.allclose(both.value.x[i], alone.value.x[0], atol=1e-9)
        assert int(both.steps[i]) == int(alone.steps[0])


def test_a_tangent_that_does_not_fit_is_refused() -> None:
    problem = smooth_problem(SmoothCell())
    double = torch.float64
    for tangent in (torch.zeros(1, D, N + 1, dtype=double), torch.zeros(2, D, N, dtype=double), torch.zeros(1, D, N)):
        with pytest.raises(ValueError, match="tangent of a leaf"):
            solve(problem, zeros(problem), step=Step(0.1, tangent=tangent))


def test_a_solve_with_a_tangent_takes_the_same_steps_with_and_without_a_trace() -> None:
    problem = smooth_problem(SmoothCell())
    step = newton_step(problem, zeros(problem))
    found = [solve(problem, zeros(problem), step=step, trace=trace, on_failure="ignore") for trace in (False, True)]
    assert torch.equal(found[0].value.x, found[1].value.x)
    assert found[0].work == found[1].work


def delayed(rho: float = 0.5) -> Problem:
    """z* = x, reached with contraction `rho`; minimise 1/2 |z - y|^2, whose Hessian in x is 1."""
    target = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    return Problem(
        lambda z, x, y: rho * z + (1 - rho) * x, lambda z, x, y: 0.5 * (z - y).square().sum(1), context=(target,)
    )


def test_a_start_at_an_equilibrium_of_zero_has_not_diverged() -> None:
    problem = delayed()
    start = problem.start(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    found = solve(problem, start, step=Step(0.2), solver=Picard(0.5), max_steps=300, on_failure="ignore")
    assert bool(found.converged.all()), found.report()


def test_a_sweep_is_one_evaluation_after_the_other() -> None:
    problem = smooth_problem(SmoothCell())
    start = zeros(problem)
    z, mu, x = (torch.randn_like(part) for part in start)
    now = problem.sweep(State(z, mu, x))
    z.requires_grad_(), x.requires_grad_()
    fz = problem.evaluate(z, x)
    seen = fz.detach().requires_grad_()
    cost = problem.cost(seen, x, *problem.context)
    slope, own = torch.autograd.grad(cost.sum(), (seen, x))
    pulled, through = torch.autograd.grad(fz, (z, x), mu + slope)
    for found, expected in zip(now, (fz, cost, mu + slope, pulled, through + own), strict=True):
        assert torch.allclose(found, expected)
        assert not found.requires_grad


def test_with_its_tangent_a_step_knows_the_gradient_in_x_whatever_mu_is() -> None:
    """Exact for a linear f; z at its equilibrium."""
    exact = linear_quadratic()
    problem, eye = exact.problem(), torch.eye(N, dtype=torch.float64)
    tangent = torch.linalg.solve(eye - exact.A, exact.B).T[None]
    x, mu = torch.randn(4, D, dtype=torch.float64), torch.randn(4, N, dtype=torch.float64)

    def z_star(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(eye - exact.A, (x @ exact.B.T + exact.c).T).T

    x.requires_grad_()
    (expected,) = torch.autograd.grad(problem.cost(z_star(x), x, *problem.context).sum(), x)
    x = x.detach()
    for own in (tangent, tangent.expand(4, -1, -1)):
        now = problem.sweep(State(z_star(x), mu, x))
        assert torch.allclose(Step(1.0, tangent=own).reduced(now.x, mu, now.mu), expected)
    assert not torch.allclose(now.x, expected, rtol=0.1)


def test_a_tangent_that_requires_grad_leaves_no_graph_behind() -> None:
    problem = smooth_problem(SmoothCell())
    tangent = torch.zeros(1, D, N, dtype=torch.float64, requires_grad=True)
    found = solve(problem, zeros(problem), step=Step(0.1, z=0.5, tangent=tangent), on_failure="ignore")
    assert not any(leaf.requires_grad for leaf in tree.leaves(found.value))


@pytest.mark.parametrize("unit", [1.0, 255.0])
def test_a_normalised_step_is_judged_alike_in_all_units(unit: float) -> None:
    plain = smooth_problem(SmoothCell())
    start = zeros(plain)
    problem = Problem(
        lambda z, x, y: plain.f(z, x / unit, y),
        lambda z, x, y: plain.cost(z, x / unit, y),
        L2Ball(start.x, 0.5 * unit),
        plain.context,
    )
    step = Step(Normalized(0.5 * unit), lag=None, cut=None)
    solution = solve(problem, start, step=step, max_steps=4, on_failure="ignore")
    other = replace(problem, constraint=L2Ball(start.x, 0.5), f=plain.f, cost=plain.cost)
    reference = solve(other, start, step=replace(step, x=Normalized(0.5)), max_steps=4, on_failure="ignore")
    assert torch.allclose(solution.residual, reference.residual, rtol=1e-6)
