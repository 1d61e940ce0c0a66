"""Generation by latent optimisation (JIIO paper, generative experiment):

min_theta sum_i min_{x_i} 1/2 |h(z_i) - y_i|^2 + prior/2 |x_i|^2     subject to     z_i = f(z_i, x_i)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jiio.accelerated import Accelerated
from jiio.cuda_graph import captured
from jiio.problem import Problem, State
from jiio.solution import OnFailure, Solution
from jiio.solve import solve
from jiio.solver import Anderson, Delayed
from jiio.step import Step
from jiio.tasks.image_rule import ImageRule
from jiio.tasks.latent_model import LatentModel, start

PRIOR = 0.05
RATE = 1.0
REFRESHED_EVERY = 3  # joint steps, doubling
SOLVER = Delayed(Accelerated(), after=6)
# From the guess of a training, near the minimum, mixing may begin early; from the mean latent it then finds saddles. With
# a usual ridge it takes what does not come to rest in a few steps wherever rounding points: several processes part from one.
TRAINING_SOLVER = Delayed(Anderson(6, ridge=0.1), after=4)


def reconstruction(
    model: LatentModel, images: Tensor, *, prior: float = PRIOR, compute_dtype: torch.dtype | None = None
) -> Problem:
    """Fit latents to `images` (batch, channels, height, width) in [0, 1].

    compute_dtype: of the cell's evaluations (bfloat16, say), where it is not that of the iteration.

    Binds the model's weights: with graph where gradients are enabled, so that the same problem serves the solve and the
    loss; under `no_grad` for a solve alone.
    """
    f, readout = model.cell(), model.decoder()
    if compute_dtype is not None:
        f = _computed_in(compute_dtype, f)

    def cell(z: Any, x: Tensor, target: Tensor) -> Any:
        return f(z, x)

    def cost(z: Any, x: Tensor, target: Tensor) -> Tensor:
        return 0.5 * squares(readout(z) - target) + 0.5 * prior * squares(x)

    return Problem(cell, cost, context=(images,), compute_dtype=compute_dtype)


def reconstruction_rule(model: LatentModel, batch: int, *, prior: float = PRIOR, rate: float = RATE) -> ImageRule:
    """Input steps that follow the curvature of each image."""
    tangent = model.tangent
    precision = prior * torch.eye(tangent.shape[1], dtype=tangent.dtype, device=tangent.device)
    weight = tangent.new_ones(1, len(tangent)).expand(batch, -1)
    return ImageRule(model.decoder(), model.slope, tangent, model.spread, weight, lambda x: precision, rate)


def reconstruction_step(model: LatentModel, batch: int, *, prior: float = PRIOR, rate: float = RATE) -> Step:
    """The joint step of `reconstruct`."""
    return latent_step(model, reconstruction_rule(model, batch, prior=prior, rate=rate))


def latent_step(model: LatentModel, rule: ImageRule) -> Step:
    """Input steps by `rule`, z moving along as it does on average."""
    return Step(replace(rule, every=REFRESHED_EVERY), tangent=model.tangent_of_z())


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
        first = start(model, len(images), latent=model.guess(images) if latent is None else latent)
        step = reconstruction_step(model, len(images), prior=prior)
        solution = solve(
            captured(reconstruction(model, images, prior=prior)),
            first,
            step=step,
            solver=SOLVER,
            max_steps=max_steps,
            on_failure=on_failure,
        )
        return model.readout(solution.value.z), solution


class GenerationLoss(nn.Module):
    """forward(images, latent) -> (loss, solution): a joint solve, then the envelope gradient (no further solve)."""

    def __init__(
        self, model: LatentModel, *, prior: float = PRIOR, joint_steps: int = 25, rate: float = RATE,
        compute_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model: LatentModel = model
        self.prior, self.joint_steps, self.rate = prior, joint_steps, rate
        self.compute_dtype = compute_dtype

    def forward(self, images: Tensor, latent: Tensor | None = None) -> tuple[Tensor, Solution[State]]:
        """The mean optimal cost of the batch, and the solve behind it, whose status the training logs; from the model's
        guess or from `latent`."""
        latent = self.model.guess(images) if latent is None else latent
        problem = reconstruction(self.model, images, prior=self.prior, compute_dtype=self.compute_dtype)
        with torch.no_grad():
            step = reconstruction_step(self.model, len(images), prior=self.prior, rate=self.rate)
        solution = solve(
            captured(problem),
            start(self.model, len(images), latent=latent),
            step=step,
            solver=TRAINING_SOLVER,
            max_steps=self.joint_steps,
            on_failure="ignore",
        )
        return problem.lagrangian(solution.value).mean(), solution


def squares(value: Tensor) -> Tensor:
    """Sum of squares of each sample, (batch,)."""
    return value.square().flatten(1).sum(1)


def _computed_in(dtype: torch.dtype, f: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A cell whose weights, bound in float32, are cast where they meet z and x of `dtype`."""

    def low(z: Any, x: Tensor) -> Any:
        with torch.autocast(x.device.type, dtype):
            return f(z, x)

    return low
