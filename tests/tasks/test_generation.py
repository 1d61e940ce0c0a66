from __future__ import annotations

import pytest
import torch

from jiio import gauss_newton, implicit, solve
from jiio.models import Generator, GeneratorConfig, generator
from jiio.tasks.generation import (
    DamagedLoss,
    GenerationLoss,
    energy,
    reconstruct,
    reconstruction,
    reconstruction_step,
    restoration,
    restoration_step,
    restore,
)
from jiio.tasks.image_rule import tangent_statistics
from jiio.tasks.latent_fit import fit_latents
from jiio.tasks.latent_model import solve_equilibrium, start
from jiio.tasks.measurement import Downsample, GaussianBlur, Hole, Identity, PixelMask, measure

OPERATORS = {
    "identity": (Identity(), 0.1),
    "hole": (Hole(), 0.0),
    "pixels": (PixelMask(), 0.05),
    "blur": (GaussianBlur(0.8), 0.02),
    "downsample": (Downsample(), 0.0),
}


def tiny(dtype: torch.dtype = torch.float32) -> Generator:
    torch.manual_seed(0)
    config = GeneratorConfig(image_shape=(1, 8, 8), latent=4, channels=(4, 8), patch=1)
    return generator(config).to(dtype)


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Smooth bumps."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.linspace(-1, 1, 8)
    centre = torch.rand(count, 2, 1, 1, generator=generator) - 0.5
    squares = (grid[:, None] - centre[:, :1]) ** 2 + (grid - centre[:, 1:]) ** 2
    return torch.exp(-4 * squares).to(dtype)


def fitted(dtype: torch.dtype = torch.float32) -> Generator:
    model = tiny(dtype)
    fit_latents(model, images(32, dtype))
    return model


def test_reconstruction_converges_and_beats_the_start() -> None:
    model = fitted()
    found, solution = reconstruct(model, images())
    assert bool(solution.converged.all())
    with torch.no_grad():
        problem = reconstruction(model, images())
        at_start = solve(problem, start(model, 6), max_steps=1, on_failure="ignore").cost
    assert bool((solution.cost < at_start).all())
    assert found.shape == (6, 1, 8, 8)


@pytest.mark.parametrize("operator, sigma", OPERATORS.values(), ids=OPERATORS)
def test_every_damage_is_solved(operator, sigma: float) -> None:
    model = fitted()
    _, solution = restore(model, measure(operator, images(), sigma=sigma))
    assert bool(solution.converged.all())


def test_restoration_without_damage_is_reconstruction_under_a_unit_gaussian() -> None:
    model = fitted(torch.float64)
    measurement = measure(Identity(), images(dtype=torch.float64))
    problem = restoration(model, measurement)
    model.density_weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    model.density_log_peak = torch.tensor([0.0, -1e30], dtype=torch.float64)
    model.density_mean = torch.zeros(2, 4, dtype=torch.float64)
    model.density_precision = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    plain = reconstruction(model, images(dtype=torch.float64), prior=float(model.residual_variance))
    state = start(model, 6, latent=torch.randn(6, 4, dtype=torch.float64))
    restored = restoration(model, measurement)
    assert torch.allclose(
        restored.cost(state.z, state.x, *restored.context), plain.cost(state.z, state.x, *plain.context)
    )
    assert problem.constraint == plain.constraint


def test_energy_of_a_mask_is_the_share_of_known_pixels() -> None:
    measurement = measure(PixelMask(), images())
    known = measurement.parameters[0].flatten(1).mean(1)
    found = energy(measurement.operator, measurement).flatten()
    assert float((found - known).abs().max()) < 0.2
    assert energy(Identity(), measure(Identity(), images())).flatten().tolist() == [1.0] * 6


def test_steps_follow_the_curvature_of_each_image() -> None:
    """The preconditioned Gauss-Newton matrices of all samples are near the identity, as those of one matrix are not."""
    model = fitted(torch.float64)
    batch = images(dtype=torch.float64)
    _, solution = reconstruct(model, batch)
    with torch.no_grad():
        problem = reconstruction(model, batch)
    matrices = gauss_newton(problem, solution.value.z, solution.value.x)
    rule = reconstruction_step(model, len(batch)).rule.refresh(solution.value.z, solution.value.x, 0)
    seen = torch.stack([rule.direction(column) for column in matrices.unbind(-1)], dim=-1)
    values = torch.linalg.eigvals(seen).real
    assert 0.2 < float(values.min()) <= float(values.max()) < 3


def test_statistics_that_mix_lose_no_curvature() -> None:
    """Where average tangents cancel, the spread takes over what they held."""
    model = fitted(torch.float64)
    found = tangent_statistics(
        model, torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
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
    module = GenerationLoss(model, joint_steps=2000, rate=0.3)
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
    loss, _ = module(batch, torch.zeros(3, 4))
    assert float(loss.detach()) == pytest.approx((values[0] + values[1]) / 2, rel=1e-2)


@pytest.mark.parametrize("gradient", ["exact", "first_order"])
def test_training_through_a_damage_gives_gradients(gradient) -> None:
    model = fitted()
    loss, solution = DamagedLoss(model, gradient=gradient, joint_steps=150)(images(), measure(Hole(), images()))
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
    assert bool(solution.converged.all())


def test_the_exact_outer_gradient_matches_finite_differences_and_the_first_order_one_does_not() -> None:
    model = fitted(torch.float64)
    batch = images(3, torch.float64)
    measurement = measure(Hole(), batch)
    step = restoration_step(model, measurement)

    def solved():
        problem = restoration(model, measurement)
        return solve(problem, start(model, 3), step=step, max_steps=4000, tol=1e-9)

    def outer(z) -> torch.Tensor:
        return 0.5 * (model.readout(z) - batch).square().flatten(1).sum(1).mean()

    outer(implicit(solved(), tol=1e-11, max_steps=2000).z).backward()
    weight = model.equilibrium.weights[0]
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    exact = float((weight.grad * direction).sum())
    values = []
    for eps in (1e-4, -1e-4):
        with torch.no_grad():
            weight.add_(eps * direction)
            values.append(float(outer(solved().value.z)))
            weight.sub_(eps * direction)
    expected = (values[0] - values[1]) / 2e-4
    assert exact == pytest.approx(expected, rel=1e-4)
    model.zero_grad()
    DamagedLoss(model, gradient="first_order", joint_steps=1000)(batch, measurement)[0].backward()
    assert abs(float((weight.grad * direction).sum()) - expected) > 1e-3 * abs(expected)


def test_an_unknown_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="'exact' or 'first_order', got 'second'"):
        DamagedLoss(tiny(), gradient="second")  # pyright: ignore[reportArgumentType]
