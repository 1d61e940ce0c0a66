"""Measured steps on problems that are none of a benchmark: fewer measurements than latents, kinks, cells that run away."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from jiio import (
    LBFGS,
    Box,
    Constraint,
    ConvergenceWarning,
    Delayed,
    Free,
    Picard,
    Problem,
    Scalar,
    State,
    Status,
    Step,
    nested,
    newton_step,
    solve,
)
from jiio.automatic import SMALL_INPUT
from jiio.curvature import curvature, response
from jiio.solution import Work
from jiio.solve import settle
from tests.problems import SmoothCell, smooth_problem, zeros


def inverse_problem(
    latents: int, size: int, measurements: int, prior: float, batch: int, seed: int = 0
) -> tuple[Problem, State]:
    """x from a few noisy linear measurements of z* = tanh(W z* + U x + b)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W, U, b = 0.8 * torch.linalg.qr(draw(size, size)).Q, 0.35 * draw(size, latents), 0.3 * draw(size)
    D = draw(measurements, size) / 2

    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T + b)

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z @ D.T - y).square().sum(1) + 0.5 * prior * x.square().sum(1)

    x, z, unseen = draw(batch, latents), torch.zeros(batch, size), torch.zeros(batch, measurements)
    for _ in range(200):
        z = f(z, x, unseen)
    problem = Problem(f, cost, context=(z @ D.T + 0.1 * draw(batch, measurements),))
    return problem, problem.start(torch.zeros(batch, latents), torch.zeros(batch, size))


def true_cost(problem: Problem, x: Tensor, size: int) -> float:
    z = torch.zeros(len(x), size)
    for _ in range(300):
        z = problem.evaluate(z, x)
    return float(problem.cost(z, x, *problem.context).mean())


@pytest.mark.parametrize(("measurements", "prior", "best"), [(4, 0.001, 0.0015), (6, 0.01, 0.0244), (30, 0.01, 0.1465)])
def test_the_automatic_step_solves_for_more_latents_than_measurements(
    measurements: int, prior: float, best: float
) -> None:
    """Undamped, not one of 32 converged with 4 or 6 measurements, at mean costs of 5; best: by L-BFGS on another draw."""
    problem, start = inverse_problem(8, 40, measurements, prior, 32)
    solution = solve(problem, start, on_failure="ignore")
    assert float(solution.converged.float().mean()) >= 0.8
    assert true_cost(problem, solution.value.x, 40) < best + 0.05


@pytest.mark.parametrize("measured", [False, True], ids=["automatic", "newton"])
@pytest.mark.parametrize("measurements", [4, 30], ids=["damped", "matrix"])
def test_an_input_of_several_dimensions_takes_the_steps_of_its_numbers_in_a_row(
    measurements: int, measured: bool
) -> None:
    flat, start = inverse_problem(8, 40, measurements, 0.1, 6)
    problem = Problem(
        lambda z, x, y: flat.f(z, x.flatten(1), y), lambda z, x, y: flat.cost(z, x.flatten(1), y), context=flat.context
    )
    wide = start._replace(x=start.x.view(6, 2, 2, 2).contiguous(memory_format=torch.channels_last))
    steps = (newton_step(flat, start), newton_step(problem, wide)) if measured else (None, None)
    a = solve(flat, start, step=steps[0], on_failure="ignore")
    b = solve(problem, wide, step=steps[1], on_failure="ignore")
    assert a.steps.tolist() == b.steps.tolist()
    assert torch.allclose(a.value.x, b.value.x.flatten(1), atol=1e-4)


def test_a_damping_that_is_not_needed_any_more_fades() -> None:
    """The first step needs it, the minimum does not: kept, it ends at 0.154."""
    problem, start = inverse_problem(8, 40, 30, 0.01, 32)
    solution = solve(problem, start)
    assert bool(solution.converged.all())
    assert true_cost(problem, solution.value.x, 40) < 0.148


@pytest.mark.parametrize("at_solutions", [False, True])
def test_a_newton_step_for_more_latents_than_measurements(at_solutions: bool) -> None:
    few, start = inverse_problem(40, 80, 12, 0.02, 8)
    if at_solutions:
        start = solve(few, start, step=newton_step(few, start), solver=Delayed(), on_failure="ignore").value
    step = newton_step(few, start)
    problem, other = inverse_problem(40, 80, 12, 0.02, 16)
    solution = solve(problem, other, step=step, solver=Delayed(), on_failure="ignore")
    assert float(solution.converged.float().mean()) >= 0.8


def test_a_sample_whose_cell_runs_away_does_not_take_the_others_along() -> None:
    torch.manual_seed(0)
    A, V = 0.6 * torch.linalg.qr(torch.randn(6, 6)).Q, torch.randn(6, 3)
    gain, target = torch.tensor([[1.0], [6.0], [1.0]]), torch.rand(3, 6)
    problem = Problem(
        lambda z, x, g, y: g * (z @ A.T) + x @ V.T, lambda z, x, g, y: (z - y).square().sum(1), context=(gain, target)
    )
    solution = solve(problem, problem.start(torch.zeros(3, 3), torch.ones(3, 6)), on_failure="ignore")
    assert solution.converged.tolist() == [True, False, True]
    assert Status(int(solution.status[1])) in (Status.DIVERGED, Status.NON_FINITE)


@pytest.mark.parametrize("target", [torch.nan, 1e4], ids=["nan", "steep"])
def test_the_measured_step_of_a_sample_is_its_own(target: float) -> None:
    problem = smooth_problem(SmoothCell(), batch=4)
    clean = solve(problem, zeros(problem))
    targets = problem.context[0].clone()
    targets[1] = target
    spoiled = solve(Problem(problem.f, problem.cost, context=(targets,)), zeros(problem), on_failure="ignore")
    others = torch.tensor([0, 2, 3])
    assert spoiled.status[others].tolist() == [Status.CONVERGED] * 3
    assert spoiled.steps[others].tolist() == clean.steps[others].tolist()
    assert float((spoiled.value.x - clean.value.x)[others].abs().max()) < 1e-10


def test_a_cost_without_second_derivative_gets_steps_of_a_size() -> None:
    torch.manual_seed(0)
    A, V, target = 0.6 * torch.linalg.qr(torch.randn(6, 6)).Q, torch.randn(6, 3), torch.rand(4, 6)
    problem = Problem(
        lambda z, x, y: torch.tanh(z @ A.T + x @ V.T), lambda z, x, y: (z - y).abs().sum(1), context=(target,)
    )
    start = problem.start(torch.zeros(4, 3), torch.zeros(4, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        found = solve(problem, start, on_failure="ignore")
        plain = solve(problem, start, step=Step(0.05), on_failure="ignore")
    before = problem.cost(start.z, start.x, *problem.context)
    assert bool((found.cost < before).all())
    assert float(found.cost.mean()) < 1.2 * float(plain.cost.mean())


@pytest.mark.parametrize("limit", [None, 0.4])
def test_a_large_input_is_solved_for_by_default(limit: float | None) -> None:
    """Plain steps by the largest curvature take twice the work and end at a higher cost."""
    problem, start = inverse_problem(400, 100, 20, 0.1, 6)
    if limit is not None:
        problem = Problem(problem.f, problem.cost, Box(-limit, limit), problem.context)
    solution = solve(problem, start)
    assert bool(solution.converged.all())
    found, first = (true_cost(problem, x, 100) for x in (solution.value.x, start.x))
    assert found < 5e-4 * first
    largest = curvature(problem, settle(problem, start, work=Work(), tol=1e-3).z, start.x, tol=0.1)
    step = Step(Scalar(0.05, scale=10 / largest))  # its residual as strict as that of the default
    plain = solve(problem, start, step=step, solver=Picard(), on_failure="ignore")
    assert solution.work.f < 0.6 * plain.work.f
    assert found < true_cost(problem, plain.value.x, 100)


def test_a_large_input_takes_less_work_than_a_nested_quasi_newton_method() -> None:
    problem, start = inverse_problem(400, 100, 20, 0.1, 6)
    solution = solve(problem, start)
    quasi = nested(problem, start, optimizer=LBFGS(), rounds=20, warm=True, solve_tol=1e-2)
    assert solution.work.f + solution.work.vjp < 0.9 * (quasi.work.f + quasi.work.vjp)
    assert true_cost(problem, solution.value.x, 100) < true_cost(problem, quasi.value.x, 100)


def test_tangents_take_a_fifth_of_the_products_of_a_plain_iteration() -> None:
    """At a contraction of 0.9 and a tolerance of 0.01 that takes 30 to 40 products a column."""
    torch.manual_seed(0)
    size, latents = 60, 5
    A = 0.9 * torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    A = (A + A.T) / 2
    U = torch.randn(latents, size, dtype=torch.float64)
    problem = Problem(lambda z, x: z @ A + x @ U, lambda z, x: z.square().sum(1))
    start, work = torch.zeros(2, latents, dtype=torch.float64), Work()
    tangent, _ = response(problem, torch.zeros(2, size, dtype=torch.float64), start, work=work)
    exact = U @ torch.linalg.inv(torch.eye(size, dtype=torch.float64) - A)
    assert float((tangent[0] - exact).norm() / exact.norm()) < 0.05
    assert work.vjp <= 2 * latents * 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_start_where_the_cost_is_flat_has_converged(dtype: torch.dtype, batch: int) -> None:
    x, z = torch.zeros(batch, 3, dtype=dtype), torch.zeros(batch, 3, dtype=dtype)
    flat = Problem(lambda z, x: 0.5 * torch.tanh(z) + x, lambda z, x: torch.relu(z - 5).square().sum(1))
    quartic = Problem(flat.f, lambda z, x: z.pow(4).sum(1))
    unmoved = Problem(lambda z, x: 0.5 * torch.tanh(z) + 1, lambda z, x: z.square().sum(1))
    for problem in (flat, quartic, unmoved):
        solution = solve(problem, problem.start(x, z), on_failure="ignore")
        assert bool(solution.converged.all())
        assert torch.equal(solution.value.x, x)


@pytest.mark.parametrize("bias", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("measured", [False, True], ids=["automatic", "newton"])
def test_an_input_that_does_not_move_z_goes_as_far_as_its_cost_says(bias: float, measured: bool) -> None:
    """Bounded by the size of z it was called converged at its start, where z is 0."""
    problem = Problem(lambda z, x: 0.5 * torch.tanh(z) + bias, lambda z, x: (x - 3).square().sum(1))
    start = problem.start(torch.zeros(2, 3), torch.zeros(2, 4))
    solution = solve(problem, start, step=newton_step(problem, start) if measured else None)
    assert bool(solution.converged.all())
    assert float((solution.value.x - 3).abs().max()) < 0.05


@pytest.mark.parametrize("constraint", [Free(), Box(-1.0, 1.0)], ids=["free", "box"])
def test_a_cost_in_other_units_is_solved_as_well(constraint: Constraint) -> None:
    draw = torch.Generator().manual_seed(0)
    size = SMALL_INPUT + 16  # no matrix is formed
    U, target = torch.randn(size, 40, generator=draw) / 9, torch.randn(3, 40, generator=draw)

    def found(unit: float) -> Tensor:
        def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return unit * ((z - y).square().sum(1) + 0.1 * x.square().sum(1))

        problem = Problem(lambda z, x, y: 0.5 * torch.tanh(z) + x @ U, cost, constraint, (target,))
        solution = solve(problem, problem.start(torch.zeros(3, size), torch.zeros(3, 40)))
        assert bool(solution.converged.all())
        return solution.cost / unit

    assert torch.allclose(found(2.0**-20), found(1.0), rtol=1e-3)


@pytest.mark.parametrize("first", [10.0, 100.0])
def test_a_step_measured_where_the_curvature_was_larger_does_not_look_like_the_end(first: float) -> None:
    """The minimum of x^4 is 0: P g is below the tolerance from x = 1.4 and 6.7 on, at costs of 4 and 2000."""
    problem = Problem(lambda z, x: 0.5 * torch.tanh(z) + x, lambda z, x: x.pow(4).sum(1))
    start = problem.start(torch.full((1, 1), first), torch.zeros(1, 1))
    solution = solve(problem, start, max_steps=600, on_failure="ignore")
    assert not bool(solution.converged.all()) or float(solution.value.x) < 0.6
    for _ in range(8):  # a further solve measures the curvature anew
        solution = solve(problem, solution.value, max_steps=600, on_failure="ignore")
    assert bool(solution.converged.all()) and float(solution.cost) < 1e-3


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_a_cost_in_other_units_takes_the_same_steps(unit: float) -> None:
    problem, start = inverse_problem(8, 40, 30, 0.1, 4)
    scaled = Problem(problem.f, lambda z, x, y: unit * problem.cost(z, x, y), context=problem.context)
    solution = solve(scaled, start, step=Step(0.02 / unit), max_steps=2000)
    tight = solve(problem, start, tol=1e-5, max_steps=2000, on_failure="ignore")
    assert bool(solution.converged.all())
    assert float((solution.value.x - tight.value.x).abs().max()) < 0.1
