"""Frechet distance between sets of images, by the features of any network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from jiio.solution import Solution

Extractor = Callable[[Tensor], Tensor]  # images (batch, channels, height, width) in [0, 1] -> (batch, features)
BATCH = 250


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to two sets of features (count, features).

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

    (Heusel et al. 2017, who take the features of an Inception network and call it FID.) Double precision, covariances with
    count - 1. Sampling makes it too large, the more the fewer images: compare equal counts only.

    >>> a = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(a, a + 3)
    9.0
    """
    mean_a, root_a = _moments(features_a)
    mean_b, root_b = _moments(features_b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"both sets need the same features, got {len(mean_a)} and {len(mean_b)}")
    # the trace of the root is the sum of the singular values of C_a^1/2 C_b^1/2: no root of an unsymmetric matrix
    shared = torch.linalg.svdvals(root_a @ root_b).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * shared
    return float((mean_a - mean_b).square().sum() + spread.clamp_min(0))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric, positive semi-definite matrix.

    >>> symmetric_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[2., 0.],
            [0., 0.]])
    """
    values, vectors = torch.linalg.eigh(matrix)
    # an eigenvalue that is 0 comes out as rounding, whose root would be 1e-8 of the largest
    noise = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return (vectors * torch.where(values > noise, values, 0.0).sqrt()) @ vectors.T


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, root of the covariance)."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (count, features) of two images or more, got {tuple(features.shape)}")
    if not bool(features.isfinite().all()):
        raise ValueError("some features are not finite")
    values = features.detach().double().cpu()
    mean = values.mean(0)
    offset = values - mean
    return mean, symmetric_root(offset.T @ offset / (len(values) - 1))


def features_of(extractor: Extractor, images: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """The features of many images, in batches on `device`, (count, features) on the CPU; `ValueError` when the extractor
    gives another shape."""
    parts = []
    for batch in images.split(BATCH):
        with torch.no_grad():
            found = extractor(batch.to(device))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(batch):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the extractor must return ({len(batch)}, features) for {len(batch)} images, got {shape}")
        parts.append(found.detach().cpu())
    return torch.cat(parts)


class ImageClassifier(Protocol):
    """What `pooled_features` needs of a classifier; `jiio.models.Classifier` is one."""

    def solve(self, x: Tensor) -> Solution[Any]:
        """z* of images."""
        ...


def pooled_features(model: ImageClassifier) -> Extractor:
    """The extractor of a classifier of this project: the mean of every channel of z*, scale by scale."""

    def extract(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([part.mean((2, 3)) for part in model.solve(images).value], dim=1)

    return extract
