"""Input steps that know the curvature of each image, and the statistics of a model that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jiio import tree
from jiio.constraint import Constraint, Free
from jiio.curvature import Linearization
from jiio.precondition import require_commuting
from jiio.problem import Problem
from jiio.solution import Work
from jiio.tasks.latent_model import LatentModel, solve_equilibrium
from jiio.tasks.measurement import Measurement

DAMPING = 0.003
TANGENT_IMAGES = 64
TANGENTS_AT_ONCE = 4  # samples, times latent size rows
MEASURED_AT_ONCE = 16  # the same


@dataclass(frozen=True)
class ImageRule:
    """Input steps that follow each sample's own curvature, at the price of a readout at the steps 0, `every` and that times
    each power of two. As many steps as with one every 4 take (digits, 64 images: 39.2 and 39.3 evaluations with `every` = 4).

    The Gauss-Newton matrix of 1/2 sum_p weight_p (h_p - y_p)^2 and of the prior is

        sum_p w_p t_p t_p^T + prior(x),      w_p = weight_p (slope_p^2 + damping),

    slope_p the derivative of the readout's sigmoid in pixel p of the current image, t_p that of the pixel before it. Of t_p
    the model keeps the average, `tangent`, and of its scatter about that one matrix per unit of w, `spread`. Without
    damping the steps of saturated images overshoot; without the scatter those of a model whose tangents differ do.
    A digits generator (200 optimiser steps) ended its training at a loss of 0.248, 0.246, 0.292, 0.251 with a damping of
    0.003, 0.01, 0.03, 0.1, and test images then took 65, 64, 86, 138 joint steps to converge; one average matrix for all
    samples took 90 and left 3 % unconverged.

    readout: z -> image.  tangent: (pixels, latent).  spread: (latent, latent).  weight: (batch, pixels).
    prior: x -> its precision, (latent, latent) or one for each sample.
    measurement: of an operator A that mixes pixels: the matrix is then believed |A diag(slope) t|^2 in place of the sum, with
    believed (batch,), 1 where it is not given.
    """

    readout: Callable[[Any], Tensor]
    slope: Callable[[Tensor], Tensor]
    tangent: Tensor
    spread: Tensor
    weight: Tensor
    prior: Callable[[Tensor], Tensor]
    rate: float
    every: int = 8
    inverse: Tensor | None = None
    measurement: Measurement | None = None
    believed: Tensor | None = None

    def refresh(self, z: Any, x: Tensor, k: int, lag: Tensor) -> ImageRule:
        """P of the image at `z`, every few steps at first, then ever more seldom: the image comes to rest."""
        if self.inverse is not None and not _doubling(k, self.every):
            return self
        with torch.no_grad():
            slope = self.slope(self.readout(z)).flatten(1).square() + DAMPING
            weight = self.weight * slope
            if self.measurement is None:
                matrix = (self.tangent.T * weight[:, None]) @ self.tangent
            else:
                matrix = self._mixed(self.measurement, slope.sqrt())
                matrix = matrix if self.believed is None else self.believed[:, None, None] * matrix
            matrix = matrix + self.prior(x) + weight.sum(1)[:, None, None] * self.spread
            # a sample that is not finite keeps a P that is not: it shows in its residual
            inverse, _ = torch.linalg.inv_ex(matrix)
        return replace(self, inverse=inverse)

    def _mixed(self, measurement: Measurement, slope: Tensor) -> Tensor:
        """Inner products of the measured tangents of each sample, (batch, latent, latent)."""
        size, parts = self.tangent.shape[1], []
        for rows in torch.arange(len(slope), device=slope.device).split(MEASURED_AT_ONCE):
            own = measurement.select(rows)
            images = (slope[rows, None] * self.tangent.T).reshape(-1, *measurement.image_shape)
            parameters = (part.repeat_interleave(size, 0) for part in own.parameters)
            seen = measurement.operator.apply(images, *parameters).reshape(len(rows), size, -1)
            parts.append(seen @ seen.mT)
        return torch.cat(parts)

    def direction(self, gradient: Tensor) -> Tensor:
        """P g."""
        assert self.inverse is not None, "the joint map refreshes a rule before it asks for a direction"
        return tree.times(self.inverse, gradient)

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with `Free` only; a weight row for each sample."""
        require_commuting(constraint, (Free,), "a curvature of images")
        if x.dim() != 2 or x.shape[1] != self.tangent.shape[1] or len(x) != len(self.weight):
            shapes = f"tangent {tuple(self.tangent.shape)}, weight {tuple(self.weight.shape)}, x {tuple(x.shape)}"
            raise ValueError(f"an image rule has tangent (pixels, latent) and weight (batch, pixels); got {shapes}")

    def select(self, rows: Tensor) -> ImageRule:
        """The rule of the samples `rows`."""
        inverse, believed = (None if part is None else part[rows] for part in (self.inverse, self.believed))
        measurement = None if self.measurement is None else self.measurement.select(rows)
        return replace(self, weight=self.weight[rows], inverse=inverse, measurement=measurement, believed=believed)


def _doubling(k: int, first: int) -> bool:
    """Whether k is 0, `first` or that times a power of two.

    >>> [k for k in range(40) if _doubling(k, 4)]
    [0, 4, 8, 16, 32]
    """
    multiple, rest = divmod(k, first)
    return rest == 0 and multiple & (multiple - 1) == 0


class TangentStatistics(NamedTuple):
    """Averages over latents, of t_p = d(pixel p before the sigmoid)/dx and w_p = slope_p^2 + damping.

    tangent: t_p, (pixels, latent).  total: sum_p w_p t_p t_p^T / sum_p w_p, (latent, latent).  share: w_p / sum_p w_p.
    """

    tangent: Tensor
    total: Tensor
    share: Tensor

    @classmethod
    def of(cls, found: Tangents) -> TangentStatistics:
        """Of tangents along all unit vectors."""
        tangent, weight = found.image, found.weight
        with torch.no_grad():
            total = (tangent.mT @ (weight[:, :, None] * tangent)).mean(0) / weight.sum(1).mean()
            return cls(tangent.mean(0), total, weight.mean(0) / weight.sum(1).mean())

    def mixed(self, new: TangentStatistics, weight: float) -> TangentStatistics:
        """Moving average. `total` keeps its size when the latent map turns under it, `tangent` shrinks: what it loses goes
        over into `spread`, so that steps on stale statistics are shorter, not longer."""
        return TangentStatistics(*(torch.lerp(a, b, weight) for a, b in zip(self, new, strict=True)))

    def spread(self) -> Tensor:
        """What `total` holds beyond the average tangent, without negative eigenvalues."""
        values, vectors = torch.linalg.eigh(self.total - (self.tangent.T * self.share) @ self.tangent)
        return (vectors * values.clamp_min(0)) @ vectors.T


class Tangents(NamedTuple):
    """What a change of a latent by each of k directions does. image: t_p at each of n latents, (n, pixels, k).  weight: w_p
    there, (n, pixels).  z: dz*/dx, mean over the latents, each map (k, channels, height, width)."""

    image: Tensor
    weight: Tensor
    z: Any


def tangents(model: LatentModel, latent: Tensor, units: Tensor | None = None) -> Tangents:
    """The tangents at the latents (n, latent), along the directions `units` (k, latent), which are all unit vectors if not
    given."""
    if units is None:
        units = torch.eye(latent.shape[1], dtype=latent.dtype, device=latent.device)
    parts = [_tangents(model, x, units) for x in latent.split(TANGENTS_AT_ONCE)]
    total = tree.apply(lambda *leaves: tree.total(leaves), *(part.z for part in parts))
    return Tangents(
        torch.cat([part.image for part in parts]),
        torch.cat([part.weight for part in parts]),
        tree.apply(lambda leaf: leaf / len(latent), total),
    )


def _tangents(model: LatentModel, x: Tensor, units: Tensor) -> Tangents:
    """Those of a few latents, the sum of dz*/dx over them in place of the mean."""
    count = len(units)
    with torch.no_grad():
        f = model.cell()
        z = solve_equilibrium(model, x, cell=f)
        # a row for every sample and direction: one pass instead of one for each direction
        rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
    problem = Problem(f, lambda z, x: x.square().sum(1))
    linearized = Linearization(problem, tree.select(z, rows), x[rows], work=Work())
    dz = tuple(linearized.tangent(units.repeat(len(x), 1)))
    with torch.no_grad():
        images = model.linear_decoder()(dz).flatten(1)
        weight = model.slope(model.readout(z)).flatten(1).square() + DAMPING
    total = tree.apply(lambda leaf: leaf.unflatten(0, (-1, count)).sum(0), dz)
    return Tangents(images.view(len(x), count, -1).mT, weight, total)


def keep(model: LatentModel, statistics: TangentStatistics) -> None:
    """Put tangent and spread into the model's buffers."""
    with torch.no_grad():
        model.tangent.copy_(statistics.tangent)
        model.spread.copy_(statistics.spread())


def refit_tangent(model: LatentModel, latent: Tensor) -> None:
    """Set the model's tangents, of the image with its spread and of z, from up to `TANGENT_IMAGES` latents."""
    found = tangents(model, latent[:TANGENT_IMAGES])
    keep(model, TangentStatistics.of(found))
    model.keep_tangent_of_z(found.z)
