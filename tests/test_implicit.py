from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from jiio import DEQ, Anderson, Box, Broyden, Constraint, Free, L2Ball, Problem, Scalar, State, Step, implicit, solve
from jiio.krylov import LinearSolution
from jiio.solution import ConvergenceWarning, NotConverged, Solution
from tests.problems import D, N, SmoothCell, smooth_problem, zeros

TIGHT = 1e-12


def solved(cell: SmoothCell, constraint: Constraint, start: State | None = None):
    """A problem and its solution; finite differences start at the solution that they perturb."""
    problem = smooth_problem(cell, constraint=constraint)
    start = zeros(problem) if start is None else start
    return problem, solve(problem, start, step=Step(Scalar(0.1)), max_steps=6000, tol=TIGHT)


def central_difference(function: Callable[[], Tensor], parameter: Tensor, eps: float = 3e-5) -> tuple[Tensor, Tensor]:
    """Directional derivatives of `function` along three random directions of `parameter`, and the directions."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(3, *parameter.shape, dtype=parameter.dtype, generator=generator)
    slopes, kept = [], parameter.data.clone()
    for direction in directions:
        values = []
        for sign in (1.0, -1.0):
            parameter.data = kept + sign * eps * direction
            values.append(function())
        slopes.append((values[0] - values[1]) / (2 * eps))
    parameter.data = kept
    return torch.stack(slopes), directions


def assert_gradient(parameter: Tensor, slopes: Tensor, directions: Tensor) -> None:
    assert parameter.grad is not None
    found = (directions * parameter.grad).flatten(1).sum(1)
    assert relative_error(found, slopes) < 1e-6


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


CONSTRAINTS = {
    "free": Free(),
    "active ball": L2Ball(torch.zeros(3, D, dtype=torch.float64), 0.2),
    "active box": Box(-0.1, 0.15),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_envelope_gradient_matches_finite_differences(constraint: Constraint) -> None:
    cell = SmoothCell()
    problem, solution = solved(cell, constraint)
    problem.lagrangian(solution.value).sum().backward()
    for parameter in cell.parameters():
        with torch.no_grad():
            expected = central_difference(lambda: solved(cell, constraint, solution.value)[1].cost.sum(), parameter)
        assert_gradient(parameter, *expected)


def outer(state) -> Tensor:
    """A loss that is not the inner cost, of every block."""
    return (state.z.sin().sum(1) + (state.x**3).sum(1) + 0.2 * state.mu.square().sum(1)).sum()


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_implicit_gradient_matches_finite_differences(constraint: Constraint) -> None:
    cell = SmoothCell()
    _, solution = solved(cell, constraint)
    if not isinstance(constraint, Free):
        assert bool((constraint.project(2 * solution.value.x) - solution.value.x).abs().amin() < 1e-6), "inactive"
    outer(implicit(solution, tol=1e-13, max_steps=2000)).backward()
    for parameter in cell.parameters():
        with torch.no_grad():
            expected = central_difference(lambda: outer(solved(cell, constraint, solution.value)[1].value), parameter)
        assert_gradient(parameter, *expected)


@pytest.mark.parametrize("training", [True, False])
def test_deq_gradient_matches_finite_differences_in_train_and_eval(training: bool) -> None:
    cell = SmoothCell()
    deq = DEQ(cell.f, tol=1e-13, gradient_tol=1e-13).train(training)
    x = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    z0 = torch.zeros(3, N, dtype=torch.float64)
    deq(x, z0).sin().sum().backward()
    with torch.no_grad():
        expected = [central_difference(lambda: deq(x, z0).sin().sum(), leaf) for leaf in (x, cell.b, cell.W)]
    for leaf, value in zip((x, cell.b, cell.W), expected, strict=True):
        assert_gradient(leaf, *value)


def test_second_derivative_of_an_equilibrium_is_refused() -> None:
    cell = SmoothCell()
    deq = DEQ(cell.f)
    x = torch.ones(1, D, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(deq(x, torch.zeros(1, N, dtype=torch.float64)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through an implicit solution"):
        torch.autograd.grad(first.sum(), x)


def test_second_derivative_of_a_joint_solution_is_refused() -> None:
    cell = SmoothCell()
    _, solution = solved(cell, Free())
    (first,) = torch.autograd.grad(outer(implicit(solution)), cell.b, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through an implicit solution"):
        torch.autograd.grad(first.sum(), cell.b)


def test_a_solution_that_depends_on_nothing_is_refused() -> None:
    cell = SmoothCell().requires_grad_(False)
    _, solution = solved(cell, Free())
    with pytest.raises(ValueError, match="nothing to differentiate"):
        implicit(solution)


def test_inference_without_parameters_is_a_constant() -> None:
    cell = SmoothCell().requires_grad_(False)
    z = DEQ(cell.f)(torch.ones(1, D, dtype=torch.float64), torch.zeros(1, N, dtype=torch.float64))
    assert not z.requires_grad


def test_the_adjoint_solve_reports_each_sample() -> None:
    _, solution = solved(SmoothCell(), Free())
    seen: list[LinearSolution] = []
    outer(implicit(solution, callback=seen.append)).backward()
    assert seen[0].converged.shape == (3,)
    assert bool(seen[0].converged.all())


def test_an_unfinished_adjoint_solve_is_reported() -> None:
    _, solution = solved(SmoothCell(), Free())
    with pytest.warns(ConvergenceWarning, match="adjoint solve of 3 of 3 samples"):
        outer(implicit(solution, tol=1e-13, max_steps=2)).backward()
    with pytest.raises(NotConverged, match="adjoint solve"):
        outer(implicit(solution, tol=1e-13, max_steps=2, on_failure="raise")).backward()


def ill_conditioned(y: Tensor) -> Solution[State]:
    """20 + 20 + 6 unknowns, x in a box and partly at its bounds: an adjoint system that GMRES(30) does not solve."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    A, V, b, C = 0.6 * torch.linalg.qr(draw(20, 20)).Q, draw(20, 6) / 2, 0.3 * draw(20), draw(15, 20) / 2

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z @ C.T - y).square().sum(1) + 0.05 * x.square().sum(1)

    problem = Problem(lambda z, x, y: torch.tanh(z @ A.T + x @ V.T + b), cost, Box(-0.1, 0.1), context=(y,))
    start = problem.start(y.new_zeros(len(y), 6), y.new_zeros(len(y), 20))
    return solve(problem, start, tol=1e-10, max_steps=4000, on_failure="ignore")


def test_an_ill_conditioned_boxed_problem_has_its_exact_gradient() -> None:
    y = 0.5 * torch.randn(2, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y.requires_grad_()
    solution = ill_conditioned(y)
    assert bool(solution.converged.all())
    seen: list[LinearSolution] = []
    (gradient,) = torch.autograd.grad(outer(implicit(solution, tol=1e-9, callback=seen.append)), y)
    assert bool(seen[0].converged.all()) and seen[0].steps < 60
    slopes, directions = central_difference(lambda: outer(ill_conditioned(y.detach()).value), y)
    assert relative_error((directions * gradient).flatten(1).sum(1), slopes) < 1e-5
    with pytest.warns(ConvergenceWarning, match="Try: a restart above 10"):
        outer(implicit(solution, restart=10)).backward()


def test_an_unconverged_solution_is_not_differentiated_silently() -> None:
    cell = SmoothCell()
    problem = smooth_problem(cell)
    solution = solve(problem, zeros(problem), step=Step(0.01), max_steps=3, on_failure="ignore")
    with pytest.warns(ConvergenceWarning, match="implicit derivative"):
        implicit(solution)


def test_the_envelope_gradient_at_a_kink_is_not_passed_off_as_exact() -> None:
    """min over x of 1/2 (z - 1)^2 + x for z = relu(x) + 2 relu(-x): the minimum x = 0 is a kink, with slope on both sides."""

    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * z + 0.5 * (x.relu() + 2 * (-x).relu()) * scale

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z + y).square().sum(1)

    problem = Problem(f, cost, context=(torch.ones(1, 1, dtype=torch.float64),))
    start = problem.start(torch.full((1, 1), 0.7, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="kink"):
        solution = solve(problem, start, step=Step(0.1), max_steps=200)
    assert abs(float(solution.value.x)) < 0.3
    assert not bool(solution.converged.any())
    with pytest.warns(ConvergenceWarning, match="implicit derivative"):
        implicit(solution)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=["anderson", "broyden"])
def test_gradients_do_not_depend_on_the_solver(solver) -> None:
    cell = SmoothCell()
    problem, reference = solved(cell, Free())
    solution = solve(problem, reference.value, step=Step(0.02), solver=solver, max_steps=600, tol=TIGHT)
    (gradient,) = torch.autograd.grad(outer(implicit(solution, tol=1e-13, max_steps=2000)), cell.b)
    (expected,) = torch.autograd.grad(outer(implicit(reference, tol=1e-13, max_steps=2000)), cell.b)
    assert relative_error(gradient, expected) < 1e-8
