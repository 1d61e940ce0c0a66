"""Structural similarity of images (Wang, Bovik, Sheikh and Simoncelli 2004)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA, RADIUS = 1.5, 5  # of the Gaussian window, in pixels
STABLE_MEAN, STABLE_SPREAD = 0.01**2, 0.03**2  # keep both quotients finite where an image is flat or black


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, clipped to [0, 1], to its truth, (batch,); 1 where they are equal.

        (2 m m' + c) (2 cov + c') / ((m^2 + m'^2 + c) (var + var' + c'))

    under a Gaussian window of 11x11 pixels and standard deviation 1.5, images reflected at their border, averaged over
    pixels and channels. `ValueError` for images with a side below 6 pixels.

    The figures are those of torchmetrics, which itself imports torchvision wherever that is installed, and so fails beside
    a torch that torchvision was not built for.

    >>> ssim(torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.5))
    tensor([1.])
    """
    if images.shape != truth.shape:
        raise ValueError(f"images {tuple(images.shape)} and truth {tuple(truth.shape)} must have one shape")
    if min(images.shape[2:]) <= RADIUS:
        raise ValueError(f"structural similarity needs sides of {RADIUS + 1} pixels or more, got {tuple(images.shape)}")
    # the variances are differences of near numbers: double precision
    a, b = images.clamp(0, 1).double(), truth.clamp(0, 1).double()
    mean_a, mean_b, square_a, square_b, product = _windowed(torch.stack((a, b, a * a, b * b, a * b)))
    spread = (square_a - mean_a**2).clamp_min(0) + (square_b - mean_b**2).clamp_min(0)
    luminance = (2 * mean_a * mean_b + STABLE_MEAN) / (mean_a**2 + mean_b**2 + STABLE_MEAN)
    structure = (2 * (product - mean_a * mean_b) + STABLE_SPREAD) / (spread + STABLE_SPREAD)
    return (luminance * structure).flatten(1).mean(1).to(images.dtype)


def _windowed(maps: Tensor) -> Tensor:
    """Gaussian means of maps (kinds, batch, channels, height, width)."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=maps.dtype, device=maps.device)
    window = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    window = (window / window.sum()).view(1, 1, -1, 1)
    height, width = maps.shape[3:]
    padded = F.pad(maps.reshape(-1, 1, height, width), (RADIUS,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, window), window.mT).view(maps.shape)
