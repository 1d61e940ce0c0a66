from __future__ import annotations

import pytest
import torch

from jiio import implicit, load, solve
from jiio.data import load_images
from jiio.tasks.generation import reconstruct, reconstruction
from jiio.tasks.latent_fit import fit_latents
from jiio.tasks.latent_model import start
from jiio.tasks.measurement import Downsample, GaussianBlur, Hole, Identity, Mask, PixelMask, damage, measure
from jiio.tasks.residual import Residual
from jiio.tasks.restoration import (
    DamagedLoss,
    energy,
    model_variance,
    pixel_weight,
    posterior_mean,
    restoration,
    restoration_step,
    restore,
)
from tests.tasks.bumps import fitted, images, tiny

OPERATORS = {
    "identity": (Identity(), 0.1),
    "hole": (Hole(), 0.0),
    "pixels": (PixelMask(), 0.05),
    "soft mask": (Mask(torch.linspace(0, 1, 64).view(1, 8, 8)), 0.05),
    "blur": (GaussianBlur(0.8), 0.02),
    "downsample": (Downsample(), 0.0),
}


@pytest.mark.parametrize("operator, sigma", OPERATORS.values(), ids=OPERATORS)
def test_every_damage_is_solved(operator, sigma: float) -> None:
    model = fitted()
    _, solution = restore(model, measure(operator, images(), sigma=sigma))
    assert bool(solution.converged.all())


def test_a_mask_that_shows_a_part_of_each_pixel_takes_steps_made_for_its_square() -> None:
    """Steps made for the mask itself took 22, and ended 0.009 from the minimum."""
    model, clean = load("digits-generator").double(), load_images("digits", "test")[:16].double()
    measurement = measure(Mask(torch.full((1, 8, 8), 0.2)), clean)
    _, solution = restore(model, measurement)
    exact = solve(restoration(model, measurement), solution.value, tol=1e-6, max_steps=1000)
    assert int(solution.steps.max()) <= 17
    assert float((solution.value.x - exact.value.x).norm(dim=1).max()) < 0.005


def test_each_pixel_strays_by_a_variance_of_its_own() -> None:
    model, clean = fitted(torch.float64), images(32, torch.float64)
    found, _ = reconstruct(model, clean)
    errors = (found - clean).square().mean(0)
    assert float(errors.max()) > 10 * float(errors.min())
    assert float(torch.corrcoef(torch.stack((model.residual_variance, errors)).flatten(1))[0, 1]) > 0.98
    assert float(model.residual_variance.mean()) == pytest.approx(float(errors.mean()), rel=0.05)


def test_a_pixel_that_is_black_in_all_training_images_may_stray_a_little() -> None:
    model, dark = tiny(torch.float64), images(32, torch.float64)
    dark[:, :, 0] = 0
    model.calibrate(dark)
    fit_latents(model, dark)
    assert float(model.residual_variance.min() / model.residual_variance.mean()) == pytest.approx(0.01, rel=0.01)


def test_the_posterior_mean_is_that_of_the_residual_that_was_fitted() -> None:
    model = fitted()
    measurement = measure(Hole(), images())
    restored, _ = restore(model, measurement)
    residual = Residual(model.residual_variance, model.residual_spectrum)
    found, known = posterior_mean(model, restored, measurement), measurement.parameters[0] > 0
    assert torch.equal(found, residual.posterior_mean(restored, measurement))
    assert torch.allclose(found[known], images()[known], atol=1e-3)
    fitted_again = Residual.fit(images(64) - reconstruct(model, images(64))[0])
    assert float(torch.corrcoef(torch.stack((residual.spectrum, fitted_again.spectrum)).log().flatten(1))[0, 1]) > 0.8


def test_the_posterior_mean_errs_less_than_the_range() -> None:
    model, clean = load("digits-generator"), load_images("digits", "test")[:24]
    for name in ("noise-0.2", "pixels", "blur", "downsample"):
        operator, sigma = damage(name)
        measurement = measure(operator, clean, sigma=sigma)
        restored, _ = restore(model, measurement, on_failure="ignore")
        errors = [float((x - clean).square().mean()) for x in (posterior_mean(model, restored, measurement), restored)]
        assert errors[0] < errors[1], name


def test_restoration_without_damage_is_reconstruction_under_a_unit_gaussian() -> None:
    model = fitted(torch.float64)
    measurement = measure(Identity(), images(dtype=torch.float64))
    problem = restoration(model, measurement)
    model.density_weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    model.density_log_peak = torch.tensor([0.0, -1e30], dtype=torch.float64)
    model.density_mean = torch.zeros(2, 4, dtype=torch.float64)
    model.density_precision = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    plain = reconstruction(model, images(dtype=torch.float64), prior=float(model.residual_variance.mean()))
    state = start(model, 6, latent=torch.randn(6, 4, dtype=torch.float64))
    restored = restoration(model, measurement)
    assert torch.allclose(
        restored.cost(state.z, state.x, *restored.context), plain.cost(state.z, state.x, *plain.context)
    )
    assert problem.constraint == plain.constraint


def test_energy_is_what_an_operator_leaves_of_smooth_changes() -> None:
    """Means over blocks of 2x2 keep a quarter of the numbers and all of what is constant; of white noise a sixteenth."""
    smooth = torch.ones(64, 1)
    assert energy(measure(Identity(), images()), smooth).tolist() == pytest.approx([1.0] * 6)
    assert energy(measure(Downsample(), images()), smooth).tolist() == pytest.approx([0.25] * 6)
    white = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert energy(measure(Downsample(), images()), white).tolist() == pytest.approx([1 / 16] * 6, rel=0.3)


@pytest.mark.parametrize(
    "operator, times",
    [
        (Identity(), 1.0),
        (Hole(), 6.0),  # a tenth of 64 pixels, three by three
        (Mask(torch.ones(1, 8, 8)), 1.0),
        (Mask((torch.arange(8) % 2).expand(1, 8, 8).float()), 2.0),
        (Mask(torch.zeros(1, 8, 8)), 16.0),
        (Downsample(2), 1.0),  # a quarter of the numbers
        (Downsample(4), 4.0),
    ],
)
def test_errors_count_as_correlated_where_much_is_left_to_guess(operator, times: float) -> None:
    model, x = load("digits-generator"), load_images("digits", "test")[:3]
    variance = float(model.residual_variance.mean())
    assert float(model_variance(model, measure(operator, x))) == pytest.approx(times * variance)


def test_how_far_pixels_are_believed_does_not_depend_on_which_are_hidden() -> None:
    """Squares of two occur or not among scattered pixels of 8x8; a batch is not weighed by its first mask."""
    model, x = load("digits-generator"), load_images("digits", "test")[:40]
    whole = measure(PixelMask(), x)
    variances = {float(model_variance(model, whole.select(slice(i, i + 1)))) for i in range(40)}
    assert variances == {float(model_variance(model, whole))}


class Fading:
    """Means over blocks that fade from sample to sample: an operator that mixes pixels, with a parameter of its own each."""

    def draw(self, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[torch.Tensor]:
        return (0.2 + 0.8 * torch.rand(1, 1, 1, generator=generator),)

    def apply(self, image: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return parameters[0] * Downsample().apply(image)

    def adjoint(self, y: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return parameters[0] * Downsample().adjoint(y)


def test_an_operator_that_differs_between_samples_is_judged_by_each() -> None:
    model, clean = fitted(), images()
    whole = measure(Fading(), clean, sigma=0.05)
    assert torch.allclose(whole.row_squares, whole.parameters[0].flatten().square() / 4, rtol=0.1)
    together, solution = restore(model, whole)
    for i in range(len(clean)):
        alone, _ = restore(model, whole.select(slice(i, i + 1)))
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    assert bool(solution.converged.all())


def test_pixels_that_are_measured_by_themselves_count_once() -> None:
    model, hidden = fitted(), measure(PixelMask(), images())
    assert torch.equal(pixel_weight(model, measure(Identity(), images())), torch.ones(6, 64))
    assert torch.equal(pixel_weight(model, hidden), hidden.parameters[0].expand(6, 1, 8, 8).flatten(1))


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
