"""What the latent tasks need of a model, and where their solves start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from jiio import tree
from jiio.deq import DEQ
from jiio.problem import State
from jiio.solution import OnFailure
from jiio.tasks.density import LatentDensity


class LatentModel(Protocol):
    """What these tasks need of a model; `jiio.models.Generator` is one."""

    tangent: Tensor
    spread: Tensor
    encoder: Tensor
    density_weight: Tensor
    density_mean: Tensor
    density_precision: Tensor
    density_log_peak: Tensor
    residual_variance: Tensor
    residual_spectrum: Tensor

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

    def tangent_of_z(self) -> Any:
        """The average dz*/dx, of the form of z with (1, latent) in place of the batch."""
        ...

    def keep_tangent_of_z(self, maps: Any) -> None:
        """Set it by maps with (latent,) in place of the batch."""
        ...


def density(model: LatentModel) -> LatentDensity:
    """The density of the latents of the model's training images."""
    return LatentDensity(model.density_weight, model.density_mean, model.density_precision, model.density_log_peak)


def start(model: LatentModel, batch: int, *, latent: Tensor | None = None) -> State:
    """Start at `latent` (batch, latent), or at the mean of the model's density, whose equilibrium is then solved for once for
    all samples: a fifth of the evaluations of a solve of digits. (Near other latents it saves none.)"""
    mean = density(model).center()
    x = mean.expand(batch, -1).clone() if latent is None else latent.to(mean)
    z = model.start(x)
    if latent is None:
        settled = solve_equilibrium(model, mean[None], on_failure="ignore")
        z = tree.apply(lambda like, one: torch.empty_like(like).copy_(one.expand_as(like)), z, settled)
    return State(z, tree.apply(torch.zeros_like, z), x)


def solve_equilibrium(
    model: LatentModel, latent: Tensor, *, tol: float = 1e-3, on_failure: OnFailure = "warn",
    cell: Callable[[Any, Tensor], Any] | None = None,
) -> Any:  # fmt: skip
    """z*(x) of latents (batch, latent), without graph; `cell`: the model's, where its weights are bound already."""
    with torch.no_grad():
        f = model.cell() if cell is None else cell
        return DEQ(f, tol=tol, on_failure=on_failure).solve(latent, model.start(latent)).value
