from __future__ import annotations

import pytest
import torch

from jiio.data import load_images
from jiio.tasks.measurement import Downsample, GaussianBlur, Hole, Identity, Mask, PixelMask, measure
from jiio.tasks.residual import Residual, cosine_transform

SHAPE = (3, 4, 5)
OPERATORS = [Identity(), Hole(2), PixelMask(), Mask(torch.linspace(0, 1, 20).view(1, 4, 5)), Downsample(1)]


def smooth() -> Residual:
    """Pixels of different variances, neighbours and colours alike."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.rand(SHAPE, generator=generator).double() * 10.0 ** -torch.arange(5).double()
    return Residual(0.01 + torch.rand(SHAPE, generator=generator).double(), spectrum + 1e-3)


def matrix(residual: Residual) -> torch.Tensor:
    """V, written out by Kronecker products."""
    C = torch.kron(torch.kron(cosine_transform(3), cosine_transform(4)), cosine_transform(5))
    D = residual.variance.flatten().sqrt().diag()
    return D @ C.T @ residual.spectrum.flatten().diag() @ C @ D


def test_the_covariance_is_that_of_independent_cosines_scaled_pixel_by_pixel() -> None:
    units = torch.eye(60, dtype=torch.float64).view(-1, *SHAPE)
    assert torch.allclose(smooth().covariance(units).flatten(1), matrix(smooth()))


def test_a_fit_finds_the_residual_that_samples_were_drawn_from() -> None:
    """A spectrum of mean 1 on pixels of one variance, so that both parts are determined."""
    true = smooth()
    true = Residual(torch.full_like(true.variance, 0.3), true.spectrum / true.spectrum.mean())
    root = torch.linalg.cholesky(matrix(true))
    drawn = torch.randn(20000, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ root.T
    found = Residual.fit(drawn.view(-1, *SHAPE))
    # the diagonal of V is not flat, which the variances take up: what both make is
    error = torch.linalg.matrix_norm(matrix(found) - matrix(true)) / torch.linalg.matrix_norm(matrix(true))
    assert float(error) < 0.25
    white = Residual.fit(0.5 * torch.randn(20000, 1, 3, 3, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(white.variance, torch.tensor(0.25), rtol=0.05)
    assert torch.allclose(white.spectrum, torch.tensor(1.0), rtol=0.05)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize("operator", [*OPERATORS, GaussianBlur(0.4)])
def test_the_posterior_mean_is_gaussian_conditioning_on_the_full_covariance(operator, sigma: float) -> None:
    residual, images = smooth(), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    measurement, restored = measure(operator, images, sigma=sigma), torch.full_like(images, 0.4)
    found, V = residual.posterior_mean(restored, measurement), matrix(residual)
    for row in range(3):
        own = measurement.select(slice(row, row + 1))
        units = torch.eye(60, dtype=torch.float64).view(-1, *SHAPE)
        A = own.operator.apply(units, *(part.expand(60, *part.shape[1:]) for part in own.parameters)).flatten(1).T
        noise = max(sigma**2, 1e-4 * float(residual.variance.min()))
        S = A @ V @ A.T + noise * torch.eye(len(A), dtype=torch.float64)
        rest = own.y.flatten() - A @ restored[row].flatten()
        correction = V @ A.T @ torch.linalg.solve(S, rest)
        error = (found[row] - restored[row]).flatten() - correction
        assert float(error.norm() / correction.norm()) < 5e-3


def test_known_pixels_without_noise_are_kept_and_hidden_ones_follow_their_neighbours() -> None:
    """A smooth residual goes on into the hole: there is no step at its edge."""
    spectrum = torch.exp(-torch.arange(8.0))[:, None] * torch.exp(-torch.arange(8.0))
    residual = Residual(torch.ones(1, 8, 8), 64 * (spectrum / spectrum.sum())[None])
    images = torch.full((2, 1, 8, 8), 0.7)
    measurement = measure(Hole(3), images)
    found = residual.posterior_mean(torch.full_like(images, 0.2), measurement)
    assert torch.allclose(found, images, atol=0.05)
    alone = residual.posterior_mean(torch.full_like(images[:1], 0.2), measurement.select(slice(0, 1)))
    assert torch.allclose(found[:1], alone, atol=1e-5)


def test_one_independent_pixel_says_nothing_of_another() -> None:
    residual = Residual(torch.ones(1, 8, 8), torch.ones(1, 8, 8))
    images = load_images("digits", "test")[:2]
    measurement = measure(Hole(3), images)
    found, hidden = residual.posterior_mean(torch.full_like(images, 0.2), measurement), measurement.mask == 0
    assert torch.allclose(found[hidden], torch.tensor(0.2), atol=1e-6)


def test_images_that_a_model_makes_exactly_leave_a_residual_that_can_be_used() -> None:
    residual, images = Residual.fit(torch.zeros(4, 1, 4, 4)), torch.full((1, 1, 4, 4), 0.5)
    assert torch.allclose(residual.posterior_mean(images, measure(Hole(2), images)), images)


def test_single_precision_undoes_a_wide_blur_as_double_does() -> None:
    """Steps in single precision ended further off than they began, so that nothing was corrected."""
    falling = (1 + torch.arange(8.0)[:, None] + torch.arange(8.0)) ** -3
    residual = Residual(torch.logspace(-2, 0, 64).view(1, 8, 8), (64 * falling / falling.sum())[None])
    double = Residual(residual.variance.double(), residual.spectrum.double())
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    restored = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    found = residual.posterior_mean(restored, measure(GaussianBlur(2.0), images))
    wanted = double.posterior_mean(restored.double(), measure(GaussianBlur(2.0), images.double()))
    error = (found - wanted).flatten(1).norm(dim=1) / (wanted - restored).flatten(1).norm(dim=1)
    assert found.dtype == torch.float32
    assert float(error.max()) < 0.2


def test_a_cosine_that_is_in_no_training_image_may_be_in_the_next() -> None:
    found = Residual.fit(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4))
    assert float(found.spectrum.min() / found.spectrum.mean()) == pytest.approx(1e-4, rel=0.01)


def test_under_a_mask_twenty_steps_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the inverse of all pixels guides them; without it they leave more than a quarter."""
    residual, images = smooth(), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    measurement, restored = measure(Hole(2), images), torch.full_like(images, 0.4)
    wanted = residual.posterior_mean(restored, measurement)
    monkeypatch.setattr("jiio.tasks.residual.INVERSION_STEPS", 20)
    found = residual.posterior_mean(restored, measurement)
    assert float((found - wanted).norm() / (wanted - restored).norm()) < 0.01
