"""Fit what restoration and first guesses need to the latents of training images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jiio.tasks.density import LatentDensity
from jiio.tasks.generation import PRIOR, reconstruct
from jiio.tasks.image_rule import TANGENT_IMAGES, refit_tangent
from jiio.tasks.latent_model import LatentModel
from jiio.tasks.residual import Residual

FIT_BATCH = 256  # images solved at once
FIT_STEPS = 60  # most of a fit, which begins near the minimum: stragglers would take most of its time


def fit_latents(
    model: LatentModel,
    images: Tensor,
    *,
    prior: float = PRIOR,
    latent: Tensor | None = None,
    watch: Callable[[int], object] = lambda images: None,
) -> None:
    """Set the model's buffers from some training images: tangent, encoder, the density of latents, the residual.

    watch: is told how many more images are done.
    """
    few = None if latent is None else latent[:TANGENT_IMAGES]
    _, first = reconstruct(model, images[:TANGENT_IMAGES], prior=prior, latent=few, on_failure="ignore")
    # with the tangent at fitted latents the fit of all is quicker and closer
    refit_tangent(model, first.value.x)
    x = torch.empty(len(images), first.value.x.shape[1]).to(first.value.x)
    error = torch.empty_like(images)
    for rows in torch.arange(len(images)).split(FIT_BATCH):
        begin = None if latent is None else latent[rows]
        fitted, solution = reconstruct(
            model, images[rows], prior=prior, latent=begin, max_steps=FIT_STEPS, on_failure="ignore"
        )
        x[rows] = solution.value.x
        error[rows] = images[rows] - fitted
        watch(len(rows))
    refit_tangent(model, x)
    found = LatentDensity.fit(x, components=len(model.density_weight))
    with torch.no_grad():
        encoder = Ridge(model.features(images[:1]).shape[1], x.shape[1])
        encoder.add(model.features(images), x)
        model.encoder.copy_(encoder.solve())
        residual = Residual.fit(error)
        model.residual_variance.copy_(residual.variance)
        model.residual_spectrum.copy_(residual.spectrum)
        for name, value in found._asdict().items():
            getattr(model, f"density_{name}").copy_(value)


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
