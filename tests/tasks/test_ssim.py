from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from jiio.tasks.ssim import ssim


def pictures(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images, and the same with noise that leaves [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.avg_pool2d(torch.rand(shape, generator=generator), 3, stride=1, padding=1)
    return truth + 0.3 * torch.randn(shape, generator=generator), truth


def by_filters(image: np.ndarray, truth: np.ndarray) -> float:
    """The published formula of one channel, with scipy's Gaussian filter (11 pixels wide, mirrored border)."""

    def window(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=3.5, mode="mirror")

    m, n = window(image), window(truth)
    covariance = window(image * truth) - m * n
    variances = window(image**2) - m**2 + window(truth**2) - n**2
    quotients = (2 * m * n + 1e-4) / (m**2 + n**2 + 1e-4) * (2 * covariance + 9e-4) / (variances + 9e-4)
    return float(quotients.mean())


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 17, 12), (2, 1, 28, 28)])
def test_the_figures_are_those_of_the_published_formula(shape: tuple[int, ...]) -> None:
    images, truth = pictures(shape)
    found = ssim(images, truth)
    for i in range(shape[0]):
        channels = zip(images[i].clamp(0, 1).double().numpy(), truth[i].double().numpy(), strict=True)
        assert float(found[i]) == pytest.approx(np.mean([by_filters(a, b) for a, b in channels]), abs=1e-6)
    assert 0 < float(found.max()) < 0.9


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 32, 32)])
def test_the_figures_are_those_of_torchmetrics(shape: tuple[int, ...]) -> None:
    measure = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    images, truth = pictures(shape)
    expected = measure(images.clamp(0, 1), truth, data_range=1.0, reduction="none")
    assert torch.allclose(ssim(images, truth), expected, atol=1e-5)


def test_equal_images_have_1_and_a_flat_image_of_the_same_mean_has_little() -> None:
    _, truth = pictures((2, 1, 16, 16))
    assert torch.allclose(ssim(truth, truth), torch.ones(2))
    flat = truth.mean((1, 2, 3), keepdim=True).expand_as(truth)
    assert float(ssim(flat, truth).max()) < 0.5


def test_every_image_counts_alone() -> None:
    images, truth = pictures((4, 1, 9, 9))
    assert torch.allclose(ssim(images[2:3], truth[2:3]), ssim(images, truth)[2:3])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="sides of 6 pixels or more"):
        ssim(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8))
    with pytest.raises(ValueError, match="must have one shape"):
        ssim(torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8))
