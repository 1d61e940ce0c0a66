from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jiio import LBFGS, Box, Delayed, LowRank, Problem, Scalar, State, Status, Step, nested, solve
from jiio.automatic import automatic
from jiio.curvature import leading, response
from jiio.solution import Work

DOUBLE = torch.float64


def steep(size: int, count: int = 3, *, numbers: int = 40, decay: float = 1.0) -> tuple[Problem, State]:
    """Tanh cells driven along directions of ever smaller weight, so that a few curvatures are far above the others."""
    generator = torch.Generator().manual_seed(0)
    W = 0.7 * torch.linalg.qr(torch.randn(numbers, numbers, generator=generator, dtype=DOUBLE)).Q
    weight = torch.arange(1, size + 1, dtype=DOUBLE) ** -decay
    U = torch.randn(numbers, size, generator=generator, dtype=DOUBLE) * weight
    target = torch.tanh(torch.randn(count, numbers, generator=generator, dtype=DOUBLE))

    def f(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x @ U.T)

    def cost(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(1) + 0.01 * x.square().sum(1)

    problem = Problem(f, cost, context=(target,))
    return problem, problem.start(torch.zeros(count, size, dtype=DOUBLE), torch.zeros(count, numbers, dtype=DOUBLE))


def rule(batch: int = 2) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(batch, 6, 2, generator=generator, dtype=DOUBLE)).Q
    values = 1 + torch.rand(batch, 2, generator=generator, dtype=DOUBLE)
    return LowRank(vectors, values, torch.full((batch, 1), 0.5, dtype=DOUBLE), 0.3)


def test_a_low_rank_step_is_the_product_with_its_matrix() -> None:
    made, gradient = rule(), torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    V, eye = made.vectors, torch.eye(6, dtype=DOUBLE)
    P = V @ torch.diag_embed(1 / made.values) @ V.mT + (eye - V @ V.mT) / made.rest[:, :, None]
    wanted = (P @ gradient.flatten(1)[:, :, None]).view_as(gradient)
    assert torch.allclose(made.direction(gradient), wanted)
    assert torch.allclose(made.select(torch.tensor([1])).direction(gradient[1:]), wanted[1:])
    assert torch.allclose(rule(1).direction(gradient)[1:], rule(1).direction(gradient[1:]))


def test_what_a_low_rank_step_does_not_fit_is_refused() -> None:
    problem, start = steep(6)
    with pytest.raises(ValueError, match=r"vectors \(batch or 1, d, k\) for x of d numbers; got \(2, 6, 2\)"):
        solve(problem, start, step=Step(rule(2)))
    boxed = Problem(problem.f, problem.cost, Box(-1.0, 1.0), problem.context)
    with pytest.raises(ValueError, match="a low-rank preconditioner"):
        solve(boxed, start, step=Step(rule(3)))


def test_the_leading_curvatures_are_those_of_the_whole_matrix() -> None:
    """From below, exact where nothing lies beyond the rank; directions in which there is no curvature do no harm."""
    problem, start = steep(90, decay=2.0)
    z = solve(problem, start, max_steps=1, on_failure="ignore").value.z
    x = start.x + 0.1
    _, whole = response(problem, z, x, tol=1e-8)
    values, vectors, slope = leading(problem, z, x, 4, tol=1e-8, work=Work())
    exact = torch.linalg.eigvalsh(whole).flip(1)[:, :4]
    assert bool((values <= 1.001 * exact).all())
    assert torch.allclose(values[:, 0], exact[:, 0], rtol=0.02)
    assert bool((values[:, 1:3] > 0.4 * exact[:, 1:3]).all())
    assert torch.allclose(vectors.mT @ vectors, torch.eye(4, dtype=DOUBLE).expand(3, 4, 4), atol=1e-8)
    along = (vectors * (whole @ vectors)).sum(1)
    assert torch.allclose(along[:, 0], exact[:, 0], rtol=0.02)
    assert bool((slope > 0).all())
    thin = Problem(lambda z, x: 0.5 * torch.tanh(z) + x[:, :2], lambda z, x: z.square().sum(1))
    flat = thin.start(torch.ones(2, 80, dtype=DOUBLE), torch.zeros(2, 2, dtype=DOUBLE))
    found, _, _ = leading(thin, solve(thin, flat, max_steps=1, on_failure="ignore").value.z, flat.x, 4, work=Work())
    assert bool((found[:, 0] > 0).all()) and bool((found[:, 2:] < 1e-9 * found[:, :1]).all())


def test_a_large_input_with_a_few_steep_directions_is_solved_for_by_default() -> None:
    """With the largest curvature alone, its residual as strict, two of three take more than 300 steps, at a higher cost."""
    problem, start = steep(200)
    step, solver = automatic(problem, start, work=Work())
    assert isinstance(step.rule, LowRank) and isinstance(solver, Delayed)
    found = solve(problem, start, max_steps=300)
    plain = Step(Scalar(0.05, scale=10 / step.rule.values[:, 0]))
    alone = solve(problem, start, step=plain, solver=solver, max_steps=300, on_failure="ignore")
    assert bool(found.converged.all())
    quasi = nested(problem, start, optimizer=LBFGS(), rounds=200, warm=True, solve_tol=1e-4)
    assert float(found.cost.mean()) < 1.05 * float(quasi.cost.mean())
    assert not bool(alone.converged.all()) and int(found.steps.max()) < 100
    assert float(found.cost.mean()) < float(alone.cost.mean())


def test_negative_curvature_of_a_large_input_is_as_steep_as_positive() -> None:
    """Taken for none, it was a step of thousands: what is maximised, or near a saddle, ended where it began."""
    problem, start = steep(90, decay=2.0)
    most = Problem(problem.f, lambda z, x, y: -problem.cost(z, x, y), context=problem.context)
    z = solve(problem, start, max_steps=1, on_failure="ignore").value.z
    values, vectors, _ = leading(problem, z, start.x, 4, tol=1e-8, work=Work())
    negative, same, _ = leading(most, z, start.x, 4, tol=1e-8, work=Work())
    assert torch.allclose(negative, values) and torch.allclose((same * vectors).sum(1).abs(), torch.ones(3, 4).double())
    waves = Problem(lambda z, x: 0.5 * z + x, lambda z, x: z.cos().sum(1))
    x = torch.linspace(-0.6, 0.6, 400, dtype=DOUBLE).view(4, 100)
    found = solve(waves, waves.start(x, torch.zeros_like(x)))
    assert bool(found.converged.all()) and float(found.cost.mean()) < -95  # the best is -100


@pytest.mark.parametrize(("prior", "bound"), [(0.0, 1e-3), (1e-3, 0.3)])
def test_a_large_input_that_the_cost_sees_two_numbers_of(prior: float, bound: float) -> None:
    """Steps along directions without curvature, or with a small prior's alone, were a thousand times too long, as soon as x
    had moved."""
    generator = torch.Generator().manual_seed(3)
    A, B = (torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((50, 100), (2, 50)))
    x, y = torch.randn(8, 100, generator=generator, dtype=DOUBLE), torch.randn(8, 2, generator=generator, dtype=DOUBLE)

    def f(z: Tensor, x: Tensor, y: Tensor, x0: Tensor) -> Tensor:
        return 0.5 * torch.tanh(z) + torch.tanh(0.3 * x @ A.T) @ B.T / 50**0.5

    def cost(z: Tensor, x: Tensor, y: Tensor, x0: Tensor) -> Tensor:
        return (z - y).square().sum(1) + prior * (x - x0).square().sum(1)

    problem = Problem(f, cost, context=(0.8 * y, x))
    found = solve(problem, problem.start(x, torch.zeros(8, 2, dtype=DOUBLE)), on_failure="ignore")
    assert float(found.cost.mean()) < bound
    assert prior > 0 or bool(found.converged.all())


def test_a_large_step_does_not_depend_on_the_default_dtype() -> None:
    problem, start = steep(80)
    values, _, _ = leading(problem, start.z, start.x, 4, work=Work())
    torch.set_default_dtype(DOUBLE)
    try:
        again, _, _ = leading(problem, start.z, start.x, 4, work=Work())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(values, again)


def test_the_gradient_is_among_the_directions_that_are_looked_along() -> None:
    """Of a thousand directions random ones hardly see a single steep one, and that is where x goes first."""
    curvature = torch.ones(1000, dtype=DOUBLE)
    curvature[7] = 100
    problem = Problem(lambda z, x: 0.5 * z + 0.5 * x, lambda z, x: 0.5 * (curvature * (z - 1).square()).sum(1))
    x = torch.zeros(2, 1000, dtype=DOUBLE)
    values, _, _ = leading(problem, x, x, 4, tol=1e-6, work=Work())
    assert bool((values[:, 0] > 90).all())


def test_a_sample_that_is_not_finite_leaves_the_others_of_a_large_input_alone() -> None:
    problem, start = steep(80)
    wanted = solve(problem, start, max_steps=14, on_failure="ignore")
    (target,) = problem.context
    target = target.clone()
    target[1, 0] = torch.nan
    broken = Problem(problem.f, problem.cost, context=(target,))
    found = solve(broken, start, max_steps=14, on_failure="ignore")
    assert found.status[1] == Status.NON_FINITE
    assert torch.allclose(found.value.x[::2], wanted.value.x[::2], rtol=0, atol=1e-10)


def test_a_large_step_is_finite_where_there_is_no_curvature() -> None:
    problem = Problem(lambda z, x: 0.5 * z + x, lambda z, x: z.sum(1))
    x = torch.zeros(2, 80, dtype=DOUBLE)
    step, _ = automatic(problem, problem.start(x, x), work=Work())
    assert bool(step.rule.direction(torch.ones_like(x)).isfinite().all())


def test_samples_do_not_depend_on_their_batch() -> None:
    problem, start = steep(80)
    step, _ = automatic(problem, start, work=Work())
    one, _ = automatic(
        problem.select(torch.tensor([2])), start._replace(z=start.z[2:], mu=start.mu[2:], x=start.x[2:]), work=Work()
    )
    assert isinstance(step.rule, LowRank) and isinstance(one.rule, LowRank)
    gradient = torch.randn(3, 80, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    assert torch.allclose(step.rule.direction(gradient)[2:], one.rule.direction(gradient[2:]), rtol=1e-8)
