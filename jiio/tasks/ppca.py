"""Probabilistic PCA (Tipping and Bishop 1999), the linear baseline of every inverse problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jiio.tasks.measurement import Measurement
from jiio.tasks.residual import Residual

LEAST_VARIANCE = 1e-6  # of a pixel in [0, 1]: a quarter of a step of 8 bits
FITTED_IMAGES = 4096  # of the residual


@dataclass(frozen=True)
class PPCA:
    """image = mean + W l + e, l ~ N(0, 1) of `latent` entries, e ~ N(0, variance) per pixel. Double precision.

    mean: (pixels,).  W: (pixels, latent).  components: the principal directions, (pixels, latent).  variance: positive.
    residual: what training images stray by from their projections, as a generator's residual is described.
    """

    mean: Tensor
    W: Tensor
    components: Tensor
    variance: float
    residual: Residual

    @classmethod
    def fit(cls, images: Tensor, latent: int) -> PPCA:
        """Maximum likelihood on images (n, channels, height, width), by the leading eigenvectors of their covariance.

        Images that are no more than `latent` + 1 leave a variance of 0, or what rounding makes of it, under which a pixel
        that is known without noise has no posterior: it counts as `LEAST_VARIANCE` then."""
        flat = images.flatten(1).double()
        if not 1 <= latent < flat.shape[1]:
            raise ValueError(
                f"latent must lie between 1 and {flat.shape[1] - 1} for PCA of {flat.shape[1]} numbers an image, got {latent}"
            )
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = leading(centred, latent)
        total = float(centred.square().sum() / len(flat))
        variance = max((total - float(values.sum())) / (flat.shape[1] - latent), LEAST_VARIANCE)
        rest = centred[:FITTED_IMAGES] - centred[:FITTED_IMAGES] @ vectors @ vectors.T
        residual = Residual.fit(rest.view(-1, *images.shape[1:]).to(images.dtype))
        return cls(mean, vectors * (values - variance).clamp_min(0).sqrt(), vectors, variance, residual)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Projection onto the principal subspace: plain PCA."""
        offset = images.flatten(1).double() - self.mean
        return (self.mean + offset @ self.components @ self.components.T).view(images.shape).to(images.dtype)

    def restore(self, measurement: Measurement) -> tuple[Tensor, Tensor]:
        """(in-range estimate mean + W E[l | y], posterior mean of the image), each of the image's shape.

        y = A image + n with n ~ N(0, sigma^2): y's covariance given l is R = variance A A^T + sigma^2.
        """
        if not measurement.mixes:
            latent, rest = self._masked(measurement)
        elif measurement.parameters:
            each = [self._dense(measurement.select(slice(i, i + 1))) for i in range(len(measurement.y))]
            latent, rest = (torch.cat(parts) for parts in zip(*each, strict=True))
        else:
            latent, rest = self._dense(measurement)
        in_range = self.mean + latent @ self.W.T
        shape = (-1, *measurement.image_shape)
        dtype = measurement.y.dtype
        return in_range.view(shape).to(dtype), (in_range + self.variance * rest).view(shape).to(dtype)

    def _masked(self, measurement: Measurement) -> tuple[Tensor, Tensor]:
        """A diagonal R: one latent x latent system a sample. Returns E[l | y] and A^T R^-1 (y - A (mean + W E[l]))."""
        y = measurement.y.flatten(1).double()
        mask = torch.ones_like(measurement.y) if measurement.mask is None else measurement.mask
        mask = mask.double().expand(len(y), *measurement.image_shape).flatten(1)
        # A^T R^-1, of pixels that are known at all; with masks between 0 and 1, some are known in part
        back = mask / torch.where(mask > 0, self.variance * mask.square() + measurement.sigma**2, 1.0)
        d = self.W.shape[1]
        outer = (self.W[:, :, None] * self.W[:, None, :]).flatten(1)
        M = ((back * mask) @ outer).view(-1, d, d) + torch.eye(d, dtype=y.dtype)
        latent = torch.linalg.solve(M, (back * (y - mask * self.mean)) @ self.W)
        return latent, back * (y - mask * (self.mean + latent @ self.W.T))

    def _dense(self, measurement: Measurement) -> tuple[Tensor, Tensor]:
        """Any operator, the same for these samples, as a matrix: exact for each linear one."""
        y, pixels = measurement.y.flatten(1).double(), len(self.mean)
        # in the dtype of the measurement: an operator with weights of its own works in no other
        units = torch.eye(pixels, dtype=measurement.y.dtype).view(-1, *measurement.image_shape)
        parameters = (part.expand(pixels, *part.shape[1:]) for part in measurement.parameters)
        A = measurement.operator.apply(units, *parameters).flatten(1).T.double()
        # a blur is nearly singular; the jitter is far below any sigma that matters
        R = self.variance * A @ A.T + (measurement.sigma**2 + 1e-8 * self.variance) * torch.eye(len(A), dtype=A.dtype)
        AW, offset = A @ self.W, y - A @ self.mean
        solved = torch.linalg.solve(R, torch.cat((AW, offset.T), dim=1))
        RW, Ry = solved[:, : AW.shape[1]], solved[:, AW.shape[1] :]
        M = AW.T @ RW + torch.eye(AW.shape[1], dtype=A.dtype)
        latent = torch.linalg.solve(M, AW.T @ Ry).T
        return latent, (A.T @ (Ry - RW @ latent.T)).T


DIRECT = 4096  # pixels up to which all eigenvectors are computed: a few seconds; for 64x64 in colour half an hour
SPARE, ITERATIONS = 32, 12


def leading(centred: Tensor, count: int, *, direct: int = DIRECT) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues, falling, and eigenvectors (pixels, count) of the covariance of `centred` (n, pixels).

    Beyond `direct` pixels by subspace iteration from a fixed start (Halko, Martinsson and Tropp 2011) on so many spare
    directions that the result is exact to some digits.
    """
    if centred.shape[1] <= direct:
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        return values.flip(0)[:count], vectors.flip(1)[:, :count]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, singular, vectors = torch.svd_lowrank(centred, q=min(count + SPARE, *centred.shape), niter=ITERATIONS)
    return singular[:count].square() / len(centred), vectors[:, :count]
