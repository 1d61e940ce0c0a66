"""Figures of merit for images in [0, 1], and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def squared_error(images: Tensor, truth: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """(sum of squared errors, number of entries), where `mask` (broadcast) is 1."""
    error = (images - truth).double().square()
    weight = torch.ones_like(error) if mask is None else mask.to(error).expand_as(error)
    return float((error * weight).sum()), float(weight.sum())


def psnr(images: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal to noise ratio in dB of the mean squared error pooled over the set, outputs clipped to [0, 1].

    >>> round(psnr(torch.full((1, 1, 2, 2), 0.9), torch.ones(1, 1, 2, 2)), 3)
    20.0
    """
    total, count = squared_error(images.clamp(0, 1), truth, mask)
    return decibel(total / count)


def decibel(error: float) -> float:
    """-10 log10 of a mean squared error; infinite for 0."""
    return math.inf if error == 0 else -10 * math.log10(error)


def each_psnr(images: Tensor, truth: Tensor, mask: Tensor | None = None) -> list[float]:
    """PSNR of every image alone, for captions."""
    masks = [None] * len(images) if mask is None else list(mask)
    return [psnr(a[None], b[None], m if m is None else m[None]) for a, b, m in zip(images, truth, masks, strict=True)]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval by Student's t over seeds; a single value has no interval: low = high = mean.

    >>> interval([1.0, 2.0, 3.0])["mean"]
    2.0
    """
    from scipy.stats import t

    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return {"mean": mean, "low": mean, "high": mean}
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}
