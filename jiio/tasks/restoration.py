"""Inverse problems solved with a generator. A measurement y = A image + noise of deviation sigma, a density p of the latents
and the generator's residual variance v of a pixel make

    min_x  1/2 v / (v c + sigma^2) |A h(z) - y|^2  -  v log p(x)     subject to     z = f(z, x)

with c the mean square of the rows of A: v times the negative log posterior where A A^T = c (masks, means over blocks; for a
blur nearly), so that it goes over into the cost of `jiio.tasks.generation` without damage.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jiio.cuda_graph import captured
from jiio.deq import DEQ
from jiio.implicit import implicit
from jiio.problem import Problem, State
from jiio.solution import OnFailure, Solution
from jiio.solve import solve
from jiio.step import Step
from jiio.tasks.density import LatentDensity
from jiio.tasks.generation import RATE, SOLVER, latent_step, squares
from jiio.tasks.image_rule import ImageRule
from jiio.tasks.latent_model import LatentModel, density, start
from jiio.tasks.measurement import Measurement
from jiio.tasks.residual import Residual

CORRELATED = 2.0
ENERGY_PROBES = 16
COHERENT = 2.0  # scatter of tangents left by an operator, over what it leaves of their mean (docs/experiments.md)
ROUGH_STEPS, ROUGH_TOL = 30, 0.1
Gradient = Literal["exact", "first_order"]


def restoration(model: LatentModel, measurement: Measurement, prior: LatentDensity | None = None) -> Problem:
    """Fit latents to a measurement, with the model's density of them or another, as the module's first lines say."""
    f, readout, operator = model.cell(), model.decoder(), measurement.operator
    variance, prior = model_variance(model, measurement), prior or density(model)
    weight = data_weight(variance, measurement)

    def cell(z: Any, x: Tensor, target: Tensor, weight: Tensor, *parameters: Tensor) -> Any:
        return f(z, x)

    def cost(z: Any, x: Tensor, target: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        misfit = operator.apply(readout(z), *parameters) - target
        return 0.5 * weight * squares(misfit) + variance * prior.energy(x)

    return Problem(cell, cost, context=(measurement.y, weight, *measurement.parameters))


def model_variance(model: LatentModel, measurement: Measurement) -> Tensor:
    """v: the model's mean residual variance, several times as much where much is left to guess.

    Errors of neighbouring pixels go together, so the numbers measured tell less than as many independent ones would, and the
    density of the latents should count for more. That helps where the measurement does not hold the latent fast by itself:
    `CORRELATED` times the side of what a mask hides, and for other operators a quarter of the numbers of an image over
    those measured, at least once (docs/experiments.md).
    """
    if measurement.mask is not None:
        times = CORRELATED * measurement.hidden_side
    else:
        times = 0.25 * math.prod(measurement.image_shape) / measurement.y[0].numel()
    return model.residual_variance.mean() * max(1.0, times)


def data_weight(variance: Tensor, measurement: Measurement) -> Tensor:
    """v / (v c + sigma^2) of each sample, (batch,): how far a number measured with noise sigma (on [0, 1]) is believed.

    A mean over many pixels has less of the model's residual than one pixel. On 150 training digits, with the steps that go
    with it, c made 23.0 of 21.1 dB of blurred ones, 19.4 of 18.2 at half the resolution, 11.6 of 11.7 at a quarter.
    """
    return variance / (variance * measurement.row_squares + measurement.sigma**2)


def restoration_step(
    model: LatentModel, measurement: Measurement, prior: LatentDensity | None = None, *, rate: float = RATE
) -> Step:
    """As `reconstruction_step`, with the measurement's share of each pixel and the density of the latents."""
    variance, prior = model_variance(model, measurement), prior or density(model)
    believed = data_weight(variance, measurement)
    weight = believed[:, None] * pixel_weight(model, measurement)

    def curvature(x: Tensor) -> Tensor:
        return variance * prior.curvature(x)

    mixed = measurement if measurement.mixes else None
    rule = ImageRule(
        model.decoder(), model.slope, model.tangent, model.spread, weight, curvature, rate, measurement=mixed,
        believed=believed,
    )  # fmt: skip
    return latent_step(model, rule)


def pixel_weight(model: LatentModel, measurement: Measurement) -> Tensor:
    """How much of each pixel is measured, (batch, pixels): its share of A^T A under a mask, else the operator's energy."""
    shape = (len(measurement.y), *measurement.image_shape)
    if not measurement.mixes:
        known = measurement.y.new_ones(1) if measurement.mask is None else measurement.mask
        # a pixel that is known in part counts by the square of its part: steps of less would end short of the minimum
        return known.square().expand(shape).flatten(1)
    kept = COHERENT * energy(measurement, model.tangent)
    return kept.view(-1, 1).expand(-1, math.prod(measurement.image_shape))


def energy(measurement: Measurement, tangent: Tensor) -> Tensor:
    """Mean |A t|^2 / |t|^2 of each sample, (batch,): what A leaves of how the image moves with the latent.

    t are random combinations of the columns of `tangent` (pixels, latent): smooth, as its scatter is, of which a blur and means
    over blocks leave far more than of white noise. Measured by that, steps met seven times the curvature they were made
    for, and of colour images enlarged fourfold 14 % were solved.
    """
    seeded = torch.Generator().manual_seed(0)
    mixtures = torch.randn(ENERGY_PROBES, tangent.shape[1], generator=seeded).to(tangent)
    kept, total = measurement.y.new_zeros(len(measurement.y)), 0.0
    for image in (mixtures @ tangent.T).view(-1, *measurement.image_shape):
        images = image.expand(len(measurement.y), *image.shape)
        kept = kept + squares(measurement.operator.apply(images, *measurement.parameters))
        total += float(image.square().sum())
    return kept / max(total, torch.finfo(tangent.dtype).tiny)


def restore(
    model: LatentModel, measurement: Measurement, *, max_steps: int = 300, on_failure: OnFailure = "warn"
) -> tuple[Tensor, Solution[State]]:
    """(restored images in the generator's range, solution) of a joint solve; its work includes that of `restoration_start`."""
    with torch.no_grad():
        first = restoration_start(model, measurement)
        solution = solve(
            captured(restoration(model, measurement)),
            first.value,
            step=restoration_step(model, measurement),
            solver=SOLVER,
            max_steps=max_steps,
            on_failure=on_failure,
        )
        solution.work.include(first.work)
        return model.readout(solution.value.z), solution


def restoration_start(model: LatentModel, measurement: Measurement) -> Solution[State]:
    """A rough solve under one Gaussian, which says near which of the density's components a measurement lies.

    From the mean of all latents the density itself leads to whatever component is widest: on 360 test digits with a hole
    13.7 dB, against 15.5 dB from this start.
    """
    with torch.no_grad():
        prior = density(model).gaussian()
        return solve(
            captured(restoration(model, measurement, prior)),
            start(model, len(measurement.y)),
            step=restoration_step(model, measurement, prior),
            max_steps=ROUGH_STEPS,
            tol=ROUGH_TOL,
            on_failure="ignore",
        )


def posterior_mean(model: LatentModel, restored: Tensor, measurement: Measurement) -> Tensor:
    """The mean of the image given its latent and y, where images stray from the generator's range by a residual of their own
    (`Residual`): of the shape of `restored` (batch, channels, height, width), neither confined to the range nor clipped.

    Pixels measured without noise are kept (to 1e-3 of y - h or so), noisy ones weighed against what the range and their
    neighbours say, means over blocks met, and hidden pixels joined to those about them.
    """
    residual = Residual(model.residual_variance, model.residual_spectrum)
    with torch.no_grad():
        return residual.posterior_mean(restored, measurement)


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
            captured(problem),
            restoration_start(self.model, measurement).value,
            step=self._step(measurement),
            solver=SOLVER,
            max_steps=self.joint_steps,
            on_failure="ignore",
        )
        z = self._equilibrium(solution)
        return 0.5 * squares(self.model.readout(z) - images).mean(), solution

    def _step(self, measurement: Measurement) -> Step:
        with torch.no_grad():
            return restoration_step(self.model, measurement, rate=self.rate)

    def _equilibrium(self, solution: Solution[State]) -> Any:
        if self.gradient == "exact":
            return implicit(solution, tol=1e-3, max_steps=100, on_failure="ignore").z
        deq = DEQ(self.model.cell(), tol=1e-3, gradient_tol=1e-3, on_failure="ignore")
        return deq(solution.value.x, solution.value.z)
