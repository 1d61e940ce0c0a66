from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from jiio.data import load_images
from jiio.tasks.measurement import Downsample, GaussianBlur, Hole, Identity, Mask, PixelMask, measure
from jiio.tasks.ppca import PPCA, leading


def data(n: int = 400) -> torch.Tensor:
    """Correlated images of 6x6 pixels."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(n, 7, dtype=torch.float64, generator=generator)
    loadings = torch.randn(7, 36, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, 36, dtype=torch.float64, generator=generator)
    return (0.5 + 0.1 * factors @ loadings + 0.05 * noise).view(n, 1, 6, 6)


def test_fit_is_the_maximum_likelihood_covariance() -> None:
    """W W^T + variance agrees with the data's covariance in the principal subspace and in its total variance."""
    images = data()
    model = PPCA.fit(images, 7)
    centred = images.flatten(1) - model.mean
    covariance = centred.T @ centred / len(images)
    fitted = model.W @ model.W.T + model.variance * torch.eye(36, dtype=torch.float64)
    assert float((fitted - covariance).trace().abs()) < 1e-9
    assert torch.allclose(fitted @ model.components, covariance @ model.components)


@pytest.mark.parametrize("count, latent", [(1, 3), (5, 6), (7, 6), (8, 6)])
@pytest.mark.parametrize("operator", [Identity(), Hole(2), GaussianBlur(0.7)])
def test_images_as_few_as_the_latent_has_entries_make_a_baseline(count: int, latent: int, operator) -> None:
    """They leave no variance to the pixels, but pixels known without noise keep their values."""
    model = PPCA.fit(data(count), latent)
    measurement = measure(operator, data(20)[10:])
    in_range, posterior = model.restore(measurement)
    assert bool(in_range.isfinite().all() and posterior.isfinite().all())
    assert float((operator.apply(posterior, *measurement.parameters) - measurement.y).abs().max()) < 1e-4


SOFT = Mask(torch.linspace(0, 1, 36, dtype=torch.float64).view(1, 6, 6))


@pytest.mark.parametrize("operator", [Identity(), Hole(2), PixelMask(0.6), SOFT, GaussianBlur(0.7), Downsample(2)])
def test_posterior_mean_is_gaussian_conditioning_on_the_full_covariance(operator) -> None:
    images = data()
    model = PPCA.fit(images, 5)
    measurement = measure(operator, images[:3], sigma=0.1)
    _, posterior = model.restore(measurement)
    C = model.W @ model.W.T + model.variance * torch.eye(36, dtype=torch.float64)
    for i in range(3):
        own = measurement.select(slice(i, i + 1))
        units = torch.eye(36, dtype=torch.float64).view(-1, 1, 6, 6)
        A = operator.apply(units, *own.parameters).flatten(1).T
        y = own.y.flatten()
        K = C @ A.T @ torch.linalg.inv(A @ C @ A.T + 0.01 * torch.eye(len(A), dtype=torch.float64))
        assert torch.allclose(posterior[i].flatten(), model.mean + K @ (y - A @ model.mean), atol=1e-6)


@dataclass(frozen=True)
class Projections:
    """`count` random projections of the image, others for each sample; with `twice` every one is measured two times."""

    count: int
    twice: bool = False

    def draw(self, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        rows = torch.randn(self.count, 36, dtype=torch.float64, generator=generator) / 6
        return (torch.cat((rows, rows)) if self.twice else rows,)

    def apply(self, image: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bmp,bp->bm", parameters[0], image.flatten(1))

    def adjoint(self, y: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bmp,bm->bp", parameters[0], y).view(-1, 1, 6, 6)


@pytest.mark.parametrize("twice, sigma", [(False, 0.1), (True, 0.1), (False, 0.0), (True, 0.0)])
def test_any_linear_operator_is_conditioned_exactly_sample_by_sample(twice: bool, sigma: float) -> None:
    """Measured twice without noise, y's covariance is singular: its pseudo-inverse conditions."""
    images = data()
    model = PPCA.fit(images, 5)
    measurement = measure(Projections(8, twice), images[:3], sigma=sigma)
    in_range, posterior = model.restore(measurement)
    C = model.W @ model.W.T + model.variance * torch.eye(36, dtype=torch.float64)
    for i in range(3):
        A = measurement.parameters[0][i]
        S = torch.linalg.pinv(
            A @ C @ A.T + sigma**2 * torch.eye(len(A), dtype=torch.float64), hermitian=True, rtol=1e-9
        )
        offset = S @ (measurement.y[i] - A @ model.mean)
        assert torch.allclose(posterior[i].flatten(), model.mean + C @ A.T @ offset, atol=1e-6)
        assert torch.allclose(in_range[i].flatten(), model.mean + model.W @ model.W.T @ A.T @ offset, atol=1e-6)


def test_complete_noiseless_data_give_back_the_image_and_shrunk_pca_in_range() -> None:
    images = data()
    model = PPCA.fit(images, 5)
    in_range, posterior = model.restore(measure(Identity(), images))
    assert torch.allclose(posterior, images, atol=1e-8)
    pca = model.reconstruct(images)
    assert float((in_range - pca).square().mean()) < 0.1 * float((pca - images).square().mean())


def test_bad_latent_is_named() -> None:
    with pytest.raises(ValueError, match="latent must lie between 1 and 35 for PCA of 36 numbers an image, got 36"):
        PPCA.fit(data(), 36)


def test_large_images_get_the_same_components_by_iteration() -> None:
    flat = load_images("digits", "train").flatten(1).double()
    values, vectors = leading(flat - flat.mean(0), 16)
    few, found = leading(flat - flat.mean(0), 16, direct=0)
    torch.testing.assert_close(few, values, rtol=1e-8, atol=0)
    torch.testing.assert_close((found * vectors).sum(0).abs(), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-8)
