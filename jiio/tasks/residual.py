"""What images stray by from a model's range, and the mean of an image given its restoration and a measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from jiio.krylov import minres
from jiio.tasks.measurement import Measurement

LEAST_VARIANCE = 0.01  # of a pixel, in parts of the mean: one that is black in all of these may not be in the next
LEAST_SPECTRUM = 1e-4  # of a cosine, in parts of the mean
NOISELESS = 1e-4  # of the least variance: noise below this is none
INVERSION_STEPS, INVERSION_TOL = 1000, 1e-3  # a blur without noise takes all of them, others a tenth
BATCH = 256


@dataclass(frozen=True)
class Residual:
    """A Gaussian of mean 0 and covariance V = D^1/2 C^T diag(spectrum) C D^1/2, D = diag(variance).

    C is the orthonormal cosine transform along channels, rows and columns. What a decoder of few numbers misses of a photograph
    is smooth, and alike in the three colours: there `spectrum` falls by four decades, and pixels tell much of their neighbours.

    variance: of each pixel, (channels, height, width).  spectrum: of each cosine of the residual in units of its deviation, of
    the same shape; 1 everywhere where pixels are independent.
    """

    variance: Tensor
    spectrum: Tensor

    @classmethod
    def fit(cls, residuals: Tensor) -> Residual:
        """From residuals of training images, (images, channels, height, width).

        >>> found = Residual.fit(torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
        >>> bool((found.spectrum - 1).abs().max() < 0.1)
        True
        """
        variance = residuals.square().mean(0)
        variance = variance.clamp_min(max(LEAST_VARIANCE * float(variance.mean()), torch.finfo(variance.dtype).tiny))
        waves, total = _waves(variance), torch.zeros_like(variance)
        for part in residuals.split(BATCH):
            total += _cosines(waves, part * variance.rsqrt()).square().sum(0)
        spectrum = total / len(residuals)
        return cls(variance, spectrum.clamp_min(LEAST_SPECTRUM * float(spectrum.mean())))

    def covariance(self, images: Tensor) -> Tensor:
        """V of each of (batch, channels, height, width)."""
        return self._filtered(self.variance.sqrt(), self.spectrum, images)

    def posterior_mean(self, restored: Tensor, measurement: Measurement) -> Tensor:
        """The mean of an image given y that strays from h = `restored` (batch, channels, height, width) by such a residual:

            h + V A^T (A V A^T + sigma^2)^-1 (y - A h)

        Of the same shape and not clipped. Noise counts as sigma^2 >= 1e-4 of the least variance. Solved for by up to
        `INVERSION_STEPS` MINRES steps; fewer than it needs smooth the correction.
        """
        y, operator, parameters = measurement.y, measurement.operator, measurement.parameters
        noise = max(measurement.sigma**2, NOISELESS * float(self.variance.min()))
        # V and the steps in double precision: in single, wide blurs ended further off than they began, uncorrected. The
        # operator in that of the measurement: one with weights of its own works in no other.
        residual = Residual(self.variance.double(), self.spectrum.double())

        def corrected(w: Tensor) -> Tensor:
            """V A^T w."""
            return residual.covariance(operator.adjoint(w.view_as(y).to(y.dtype), *parameters).double())

        def covariance(w: Tensor) -> Tensor:
            return operator.apply(corrected(w).to(y.dtype), *parameters).flatten(1) + noise * w

        rest = (y - operator.apply(restored, *parameters)).flatten(1).double()
        inverse = None if measurement.mixes else residual._inverse(measurement, noise)
        found = minres(covariance, rest, tol=INVERSION_TOL, max_steps=INVERSION_STEPS, preconditioner=inverse)
        return restored + corrected(found.value).to(restored.dtype)

    def _inverse(self, measurement: Measurement, noise: float) -> Callable[[Tensor], Tensor]:
        """About the inverse of A V A^T + noise for a mask: that of V + noise, cut to the pixels that are known. Exact where all
        are, and of one variance."""
        y = measurement.y
        known = self.variance.new_ones(1) if measurement.mask is None else (measurement.mask > 0).to(self.variance)
        both = self.variance + noise
        share = self.variance.sum() / both.sum()
        spectrum = share * self.spectrum + (1 - share)

        def inverse(r: Tensor) -> Tensor:
            r = r.view_as(y)
            return (known * self._filtered(both.rsqrt(), 1 / spectrum, known * r) + (1 - known) * r).flatten(1)

        return inverse

    @cached_property
    def _waves(self) -> tuple[Tensor, ...]:
        return _waves(self.variance)

    def _filtered(self, scale: Tensor, diagonal: Tensor, images: Tensor) -> Tensor:
        """diag(scale) C^T diag(diagonal) C diag(scale) of each image."""
        channels, rows, columns = self._waves
        inside = diagonal * _cosines(self._waves, scale * images)
        return scale * torch.einsum("ab,nahw->nbhw", channels, rows.T @ inside @ columns)


def _waves(like: Tensor) -> tuple[Tensor, ...]:
    return tuple(cosine_transform(side).to(like) for side in like.shape)


def _cosines(waves: tuple[Tensor, ...], images: Tensor) -> Tensor:
    """C of each of (batch, channels, height, width)."""
    channels, rows, columns = waves
    return torch.einsum("ab,nbhw->nahw", channels, rows @ images @ columns.T)


def cosine_transform(side: int) -> Tensor:
    """The orthonormal matrix (side, side) of the cosine transform of the second kind, in double precision.

    >>> C = cosine_transform(5)
    >>> bool(torch.allclose(C @ C.T, torch.eye(5, dtype=torch.float64)))
    True
    """
    places = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * places[:, None] * (places + 0.5)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves
