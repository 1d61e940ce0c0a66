from __future__ import annotations

import pytest
import torch

from jiio import gauss_newton, solve
from jiio.tasks.generation import GenerationLoss, reconstruct, reconstruction, reconstruction_step
from jiio.tasks.image_rule import TangentStatistics, tangents
from jiio.tasks.latent_model import solve_equilibrium, start
from tests.tasks.bumps import fitted, images


def test_reconstruction_converges_and_beats_the_start() -> None:
    model = fitted()
    found, solution = reconstruct(model, images())
    assert bool(solution.converged.all())
    with torch.no_grad():
        problem = reconstruction(model, images())
        at_start = solve(problem, start(model, 6), max_steps=1, on_failure="ignore").cost
    assert bool((solution.cost < at_start).all())
    assert found.shape == (6, 1, 8, 8)


def test_steps_follow_the_curvature_of_each_image() -> None:
    """The preconditioned Gauss-Newton matrices of all samples are near the identity, as those of one matrix are not."""
    model = fitted(torch.float64)
    batch = images(dtype=torch.float64)
    _, solution = reconstruct(model, batch)
    with torch.no_grad():
        problem = reconstruction(model, batch)
    matrices = gauss_newton(problem, solution.value.z, solution.value.x)
    rule = reconstruction_step(model, len(batch)).rule.refresh(
        solution.value.z, solution.value.x, 0, solution.residual[:, 0]
    )
    seen = torch.stack([rule.direction(column) for column in matrices.unbind(-1)], dim=-1)
    values = torch.linalg.eigvals(seen).real
    assert 0.2 < float(values.min()) <= float(values.max()) < 3


def test_statistics_that_mix_lose_no_curvature() -> None:
    """Where average tangents cancel, the spread takes over what they held."""
    model = fitted(torch.float64)
    latents = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = TangentStatistics.of(tangents(model, latents))
    opposite = found._replace(tangent=-found.tangent)
    mixed = found.mixed(opposite, 0.5)
    assert float(mixed.tangent.abs().max()) < 1e-12
    assert torch.allclose(mixed.spread(), found.total)


def test_a_bfloat16_cell_gives_nearly_the_loss_and_gradient_of_a_float32_one() -> None:
    model, batch, found = fitted(), images(), []
    for dtype in (None, torch.bfloat16):
        model.zero_grad()
        loss, solution = GenerationLoss(model, joint_steps=40, compute_dtype=dtype)(batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert gradient.dtype == solution.value.x.dtype == solution.value.z[0].dtype == torch.float32
        found.append((float(loss.detach()), gradient))
    (exact, wanted), (low, got) = found
    assert low == pytest.approx(exact, rel=0.02) and low != exact
    assert float(torch.cosine_similarity(wanted, got, dim=0)) > 0.98
    problem = reconstruction(model, batch, compute_dtype=torch.bfloat16)
    first = start(model, 6)
    seen = problem.f(tuple(part.bfloat16() for part in first.z), first.x.bfloat16(), *problem.context)
    assert all(part.dtype == torch.bfloat16 for part in seen)


def test_equilibria_of_latents_do_not_depend_on_their_batch() -> None:
    model = fitted(torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together, alone = solve_equilibrium(model, x), solve_equilibrium(model, x[1:2])
    assert all(torch.allclose(a[1:2], b, atol=1e-10) for a, b in zip(together, alone, strict=True))


def test_the_training_loss_is_the_optimal_cost_with_its_exact_gradient() -> None:
    """Against central differences of the re-solved cost along a random direction of all weights."""
    model = fitted(torch.float64)
    module = GenerationLoss(model, joint_steps=2000)
    batch = images(3, torch.float64)

    def optimum() -> torch.Tensor:
        with torch.no_grad():
            problem, step = reconstruction(model, batch), reconstruction_step(model, 3)
            return solve(problem, start(model, 3), step=step, max_steps=4000, tol=1e-9).cost.mean()

    problem, step = reconstruction(model, batch), reconstruction_step(model, 3)
    solution = solve(problem, start(model, 3), step=step, max_steps=4000, tol=1e-9)
    problem.lagrangian(solution.value).mean().backward()
    generator = torch.Generator().manual_seed(2)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    directions = [
        torch.randn(p.shape, dtype=p.dtype, generator=generator) * p.detach().norm() / p.numel() ** 0.5
        for p in parameters
    ]
    slope = sum(float((p.grad * d.detach()).sum()) for p, d in zip(parameters, directions, strict=True))  # pyright: ignore
    values, eps = [], 1e-4
    for sign in (1, -2, 1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * eps * d)
        if sign != 1 or not values:
            values.append(float(optimum()))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4)
    loss, _ = module(batch)
    assert float(loss.detach()) == pytest.approx((values[0] + values[1]) / 2, rel=1e-2)
