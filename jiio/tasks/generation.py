"""Generation by latent optimisation, and inverse problems solved with the generator.

Training (JIIO paper, generative experiment):   min_theta sum_i min_{x_i} 1/2 |h(z_i) - y_i|^2 + prior/2 |x_i|^2
Restoration of a measurement y = A image + noise, with a Gaussian on the latents and pixel residual variance v:

    min_x  1/2 v / (v + sigma^2) |A h(z) - y|^2  +  v/2 (x - m)^T S^-1 (x - m)

which is v times the negative log posterior, so that it goes over into the training cost without damage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from jiio import tree
from jiio.constraint import Constraint
from jiio.curvature import Linearization
from jiio.deq import DEQ
from jiio.implicit import implicit
from jiio.precondition import Matrix, Step
from jiio.problem import Problem, State
from jiio.solution import OnFailure, Solution, Work
from jiio.solve import solve
from jiio.tasks.measurement import Measurement, Operator

PRIOR = 0.05
RATE = 0.3
DAMPING = 0.003
CORRELATED = 4.0
TANGENTS_AT_ONCE = 4  # samples, times latent size rows
Gradient = Literal["exact", "first_order"]


class LatentModel(Protocol):
    """What the tasks of this module need of a model; `jiio.models.Generator` is one."""

    tangent: Tensor
    spread: Tensor
    encoder: Tensor
    latent_mean: Tensor
    latent_precision: Tensor
    residual_variance: Tensor

    def cell(self) -> Callable[[Any, Tensor], Any]:
        """f(z, x) with weights bound once."""
        ...

    def decoder(self) -> Callable[[Any], Tensor]:
        """The readout with weights bound once."""
        ...

    def linear_decoder(self) -> Callable[[Any], Tensor]:
        """The linear part of the readout."""
        ...

    def slope(self, image: Tensor) -> Tensor:
        """Derivative of the readout's last, element-wise function where it gave `image`."""
        ...

    def readout(self, z: Any) -> Tensor:
        """The image of an equilibrium."""
        ...

    def guess(self, images: Tensor) -> Tensor:
        """A first guess of the latents of images."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """What the linear `encoder` sees of images."""
        ...

    def start(self, x: Tensor) -> Any:
        """A first z for the latents x."""
        ...


def reconstruction(model: LatentModel, images: Tensor, *, prior: float = PRIOR) -> Problem:
    """Fit latents to `images` (batch, channels, height, width) in [0, 1].

    Binds the model's weights: with graph where gradients are enabled, so that the same problem serves the solve and the
    loss; under `no_grad` for a solve alone.
    """
    f, readout = model.cell(), model.decoder()

    def cell(z: Any, x: Tensor, target: Tensor) -> Any:
        return f(z, x)

    def cost(z: Any, x: Tensor, target: Tensor) -> Tensor:
        return 0.5 * _squares(readout(z) - target) + 0.5 * prior * _squares(x)

    return Problem(cell, cost, context=(images,))


def restoration(model: LatentModel, measurement: Measurement) -> Problem:
    """Fit latents to a measurement, with the model's Gaussian on them, as the module's first lines say."""
    f, readout, operator = model.cell(), model.decoder(), measurement.operator
    variance, mean, precision = model_variance(model, measurement), model.latent_mean, model.latent_precision
    weight = data_weight(variance, measurement.sigma)

    def cell(z: Any, x: Tensor, target: Tensor, *parameters: Tensor) -> Any:
        return f(z, x)

    def cost(z: Any, x: Tensor, target: Tensor, *parameters: Tensor) -> Tensor:
        misfit = operator.apply(readout(z), *parameters) - target
        offset = x - mean
        return 0.5 * weight * _squares(misfit) + 0.5 * variance * ((offset @ precision) * offset).sum(1)

    return Problem(cell, cost, context=(measurement.y, *measurement.parameters))


def model_variance(model: LatentModel, measurement: Measurement) -> Tensor:
    """v: the model's residual variance, `CORRELATED` times as much where pixels are hidden.

    Errors of neighbouring pixels go together, so known pixels tell less than as many independent ones would. The factor
    was chosen on training digits with a hole: 13.6, 14.0, 14.3, 14.2, 13.8 dB with 1, 2, 4, 8, 16.
    """
    return model.residual_variance * (CORRELATED if measurement.parameters else 1.0)


def data_weight(variance: Tensor, sigma: float) -> Tensor:
    """v / (v + sigma^2): how far a pixel measured with noise `sigma` (on the scale [0, 1]) is believed."""
    return variance / (variance + sigma**2)


@dataclass(frozen=True)
class ImageRule:
    """Input steps that follow each sample's own curvature, at the price of a readout every `every` steps.

    The Gauss-Newton matrix of 1/2 sum_p weight_p (h_p - y_p)^2 + 1/2 |x|^2_precision is

        sum_p w_p t_p t_p^T + precision,      w_p = weight_p (slope_p^2 + damping),

    slope_p the derivative of the readout's sigmoid in pixel p of the current image, t_p that of the pixel before it. Of t_p
    the model keeps the average, `tangent`, and of its scatter about that one matrix per unit of w, `spread`. Without
    damping the steps of saturated images overshoot; without the scatter those of a model whose tangents differ do.
    A digits generator (200 optimiser steps) ended its training at a loss of 0.248, 0.246, 0.292, 0.251 with a damping of
    0.003, 0.01, 0.03, 0.1, and test images then took 65, 64, 86, 138 joint steps to converge; one average matrix for all
    samples took 90 and left 3 % unconverged.

    readout: z -> image.  tangent: (pixels, latent).  spread: (latent, latent).  weight: (batch, pixels).
    precision: (latent, latent).
    """

    readout: Callable[[Any], Tensor]
    slope: Callable[[Tensor], Tensor]
    tangent: Tensor
    spread: Tensor
    weight: Tensor
    precision: Tensor
    rate: float = RATE
    every: int = 8
    inverse: Tensor | None = None

    def refresh(self, z: Any, k: int) -> ImageRule:
        """P of the image at `z`, every few steps."""
        if k % self.every and self.inverse is not None:
            return self
        with torch.no_grad():
            weight = self.weight * (self.slope(self.readout(z)).flatten(1).square() + DAMPING)
            matrix = (self.tangent.T * weight[:, None]) @ self.tangent + self.precision
            matrix = matrix + weight.sum(1)[:, None, None] * self.spread
            # a sample that is not finite keeps a P that is not: it shows in its residual
            inverse, _ = torch.linalg.inv_ex(matrix)
        return replace(self, inverse=inverse)

    def direction(self, gradient: Tensor) -> Tensor:
        """P g."""
        assert self.inverse is not None, "the joint map refreshes a rule before it asks for a direction"
        return torch.einsum("bij,bj->bi", self.inverse, gradient)

    def check(self, constraint: Constraint) -> None:
        """Commutes with `Free` only."""
        Matrix(self.precision).check(constraint)

    def select(self, rows: Tensor) -> ImageRule:
        """The rule of the samples `rows`."""
        inverse = None if self.inverse is None else self.inverse[rows]
        return replace(self, weight=self.weight[rows], inverse=inverse)


def reconstruction_step(model: LatentModel, batch: int, *, prior: float = PRIOR, rate: float = RATE) -> Step:
    """Steps that follow the curvature of each image."""
    tangent = model.tangent
    precision = prior * torch.eye(tangent.shape[1], dtype=tangent.dtype, device=tangent.device)
    weight = tangent.new_ones(1, len(tangent)).expand(batch, -1)
    return Step(ImageRule(model.decoder(), model.slope, tangent, model.spread, weight, precision, rate))


def restoration_step(model: LatentModel, measurement: Measurement, *, rate: float = RATE) -> Step:
    """The same with the measurement's share of each pixel and the fitted Gaussian."""
    variance = model_variance(model, measurement)
    weight = data_weight(variance, measurement.sigma) * pixel_weight(measurement)
    precision = variance * model.latent_precision
    return Step(ImageRule(model.decoder(), model.slope, model.tangent, model.spread, weight, precision, rate))


def pixel_weight(measurement: Measurement) -> Tensor:
    """How much of each pixel is measured, (batch, pixels): the mask where there is one, else the operator's energy."""
    shape = (len(measurement.y), *measurement.image_shape)
    if measurement.parameters:
        return measurement.parameters[0].expand(shape).flatten(1)
    return energy(measurement.operator, measurement).view(-1, 1).expand(-1, math.prod(measurement.image_shape))


def energy(operator: Operator, measurement: Measurement) -> Tensor:
    """Mean |A r|^2 / |r|^2 over white noise r, of each sample: what A leaves of the data term's curvature, (batch,)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(measurement.image_shape, generator=generator).to(measurement.y)
    noise = noise.expand(len(measurement.y), *measurement.image_shape)
    return _squares(operator.apply(noise, *measurement.parameters)) / _squares(noise)


def start(model: LatentModel, batch: int, *, latent: Tensor | None = None) -> State:
    """Start at the fitted mean of the latents, or at `latent` (batch, latent)."""
    mean = model.latent_mean
    x = mean.expand(batch, -1).clone() if latent is None else latent.to(mean)
    z = model.start(x)
    return State(z, tuple(torch.zeros_like(part) for part in z), x)


def reconstruct(
    model: LatentModel,
    images: Tensor,
    *,
    prior: float = PRIOR,
    latent: Tensor | None = None,
    max_steps: int = 300,
    on_failure: OnFailure = "warn",
) -> tuple[Tensor, Solution[State]]:
    """(reconstructed images, solution) of a joint solve, from the model's guess or from `latent`."""
    with torch.no_grad():
        latent = model.guess(images) if latent is None else latent
        problem = reconstruction(model, images, prior=prior)
        step = reconstruction_step(model, len(images), prior=prior)
        solution = solve(
            problem, start(model, len(images), latent=latent), step=step, max_steps=max_steps, on_failure=on_failure
        )
        return model.readout(solution.value.z), solution


def restore(
    model: LatentModel, measurement: Measurement, *, max_steps: int = 300, on_failure: OnFailure = "warn"
) -> tuple[Tensor, Solution[State]]:
    """(restored images in the generator's range, solution) of a joint solve."""
    with torch.no_grad():
        problem, step = restoration(model, measurement), restoration_step(model, measurement)
        solution = solve(
            problem, start(model, len(measurement.y)), step=step, max_steps=max_steps, on_failure=on_failure
        )
        return model.readout(solution.value.z), solution


class TangentStatistics(NamedTuple):
    """Averages over latents, of t_p = d(pixel p before the sigmoid)/dx and w_p = slope_p^2 + damping.

    tangent: t_p, (pixels, latent).  total: sum_p w_p t_p t_p^T / sum_p w_p, (latent, latent).  share: w_p / sum_p w_p.
    """

    tangent: Tensor
    total: Tensor
    share: Tensor

    def mixed(self, new: TangentStatistics, weight: float) -> TangentStatistics:
        """Moving average. `total` keeps its size when the latent map turns under it, `tangent` shrinks: what it loses goes
        over into `spread`, so that steps on stale statistics are shorter, not longer."""
        return TangentStatistics(*(torch.lerp(a, b, weight) for a, b in zip(self, new, strict=True)))

    def spread(self) -> Tensor:
        """What `total` holds beyond the average tangent, without negative eigenvalues."""
        values, vectors = torch.linalg.eigh(self.total - (self.tangent.T * self.share) @ self.tangent)
        return (vectors * values.clamp_min(0)) @ vectors.T


def tangent_statistics(model: LatentModel, latent: Tensor) -> TangentStatistics:
    """The statistics of `ImageRule` at some latents."""
    with torch.no_grad():
        f, linear = model.cell(), model.linear_decoder()
    problem = Problem(f, lambda z, x: x.square().sum(1))
    size = latent.shape[1]
    units = torch.eye(size, dtype=latent.dtype, device=latent.device)
    parts, weights = [], []
    for x in latent.split(TANGENTS_AT_ONCE):
        z = solve_equilibrium(model, x)
        # a row for every sample and direction: one pass instead of one for each direction
        rows = torch.arange(len(x), device=x.device).repeat_interleave(size)
        linearized = Linearization(problem, tree.select(z, rows), x[rows], work=Work())
        dz = linearized.tangent(units.repeat(len(x), 1))
        with torch.no_grad():
            parts.append(linear(tuple(dz)).flatten(1).view(len(x), size, -1).mT)
            weights.append(model.slope(model.readout(z)).flatten(1).square() + DAMPING)
    with torch.no_grad():
        tangents, weight = torch.cat(parts), torch.cat(weights)
        total = (tangents.mT @ (weight[:, :, None] * tangents)).mean(0) / weight.sum(1).mean()
        return TangentStatistics(tangents.mean(0), total, weight.mean(0) / weight.sum(1).mean())


def keep(model: LatentModel, statistics: TangentStatistics) -> None:
    """Put tangent and spread into the model's buffers."""
    with torch.no_grad():
        model.tangent.copy_(statistics.tangent)
        model.spread.copy_(statistics.spread())


def solve_equilibrium(model: LatentModel, latent: Tensor, *, tol: float = 1e-3) -> Any:
    """z*(x) of latents (batch, latent), without graph."""
    with torch.no_grad():
        return DEQ(model.cell(), tol=tol).solve(latent, model.start(latent)).value


def fit_latents(model: LatentModel, images: Tensor, *, prior: float = PRIOR, latent: Tensor | None = None) -> None:
    """Set the model's buffers from some training images: tangent, encoder, the latents' Gaussian, residual variance."""
    _, first = reconstruct(model, images, prior=prior, latent=latent, on_failure="ignore")
    refit_tangent(model, first.value.x)
    # with the tangent at the fitted latents the second fit is quicker and closer
    fitted, second = reconstruct(model, images, prior=prior, latent=first.value.x, on_failure="ignore")
    x = second.value.x
    refit_tangent(model, x)
    with torch.no_grad():
        encoder = Ridge(model.features(images[:1]).shape[1], x.shape[1])
        encoder.add(model.features(images), x)
        model.encoder.copy_(encoder.solve())
        model.residual_variance.copy_((fitted - images).square().mean())
        model.latent_mean.copy_(x.mean(0))
        covariance = torch.cov(x.T) + 1e-3 * x.var() * torch.eye(x.shape[1]).to(x)
        model.latent_precision.copy_(torch.linalg.inv(covariance))


class Ridge:
    """Running least squares x = features @ encoder, older pairs forgotten by `decay` at each `add`."""

    def __init__(self, rows: int, columns: int, *, decay: float = 1.0, ridge: float = 1e-2):
        self.square, self.product = torch.zeros(rows, rows), torch.zeros(rows, columns)
        self.count, self.decay, self.ridge = 0.0, decay, ridge

    def add(self, features: Tensor, x: Tensor) -> None:
        """Take in some pairs."""
        self.square = self.decay * self.square + (features.T @ features).cpu()
        self.product = self.decay * self.product + (features.T @ x).cpu()
        self.count = self.decay * self.count + len(features)

    def solve(self) -> Tensor:
        """The encoder, (rows, columns), with a ridge of `ridge` times the number of pairs on each weight."""
        weight = self.square + self.ridge * self.count * torch.eye(len(self.square))
        return torch.linalg.solve(weight, self.product)


def refit_tangent(model: LatentModel, latent: Tensor) -> None:
    """Set the model's tangent and its spread from up to 64 latents."""
    keep(model, tangent_statistics(model, latent[:64]))


class GenerationLoss(nn.Module):
    """forward(images, latent) -> (loss, solution): a joint solve, then the envelope gradient (no further solve)."""

    def __init__(self, model: LatentModel, *, prior: float = PRIOR, joint_steps: int = 25, rate: float = RATE):
        super().__init__()
        self.model: LatentModel = model
        self.prior, self.joint_steps, self.rate = prior, joint_steps, rate

    def forward(self, images: Tensor, latent: Tensor | None = None) -> tuple[Tensor, Solution[State]]:
        """The mean optimal cost of the batch, and the solve behind it, whose status the training logs; from the model's
        guess or from `latent`."""
        latent = self.model.guess(images) if latent is None else latent
        problem = reconstruction(self.model, images, prior=self.prior)
        solution = solve(
            problem,
            start(self.model, len(images), latent=latent),
            step=self._step(len(images)),
            max_steps=self.joint_steps,
            on_failure="ignore",
        )
        return problem.lagrangian(solution.value).mean(), solution

    def _step(self, batch: int) -> Step:
        with torch.no_grad():
            return reconstruction_step(self.model, batch, prior=self.prior, rate=self.rate)


class DamagedLoss(nn.Module):
    """forward(images, measurement) -> (loss, solution): restore a measurement, compare with the clean image.

    The outer loss is not the inner cost, so its gradient is not free. gradient = "exact": implicit differentiation, one
    linear solve. "first_order": x* held constant, the path through it dropped; cheaper and biased.
    """

    def __init__(self, model: LatentModel, *, gradient: Gradient = "exact", joint_steps: int = 60, rate: float = RATE):
        super().__init__()
        if gradient not in ("exact", "first_order"):
            raise ValueError(f"gradient must be 'exact' or 'first_order', got {gradient!r}")
        self.model: LatentModel = model
        self.gradient, self.joint_steps, self.rate = gradient, joint_steps, rate

    def forward(self, images: Tensor, measurement: Measurement) -> tuple[Tensor, Solution[State]]:
        """Half the mean squared error of an image, summed over its pixels."""
        problem = restoration(self.model, measurement)
        solution = solve(
            problem,
            start(self.model, len(images)),
            step=self._step(measurement),
            max_steps=self.joint_steps,
            on_failure="ignore",
        )
        z = self._equilibrium(solution)
        return 0.5 * _squares(self.model.readout(z) - images).mean(), solution

    def _step(self, measurement: Measurement) -> Step:
        with torch.no_grad():
            return restoration_step(self.model, measurement, rate=self.rate)

    def _equilibrium(self, solution: Solution[State]) -> Any:
        if self.gradient == "exact":
            return implicit(solution, tol=1e-3, max_steps=100, on_failure="ignore").z
        deq = DEQ(self.model.cell(), tol=1e-3, gradient_tol=1e-3, on_failure="ignore")
        return deq(solution.value.x, solution.value.z)


def _squares(value: Tensor) -> Tensor:
    return value.square().flatten(1).sum(1)
