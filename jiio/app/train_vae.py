"""`jiio train vae`: the baseline of `train generation`, a variational autoencoder with the same decoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from jiio.app.progress import images_bar
from jiio.app.run_folder import UserError, user_input
from jiio.app.team import Team
from jiio.app.train_generation import FITTED_IMAGES, Preset, default_config
from jiio.app.training import Order, Trainable, chosen
from jiio.data import load_images
from jiio.models import VAE, VAEConfig, vae
from jiio.regularize import jacobian_penalty
from jiio.tasks.metrics import decibel
from jiio.tasks.vae import VAELoss, fit_vae


@dataclass(frozen=True)
class Training:
    """Options of a training that decide its result; saved in the run's config.json.

    images: training images used, chosen by the seed; 0 for all.  steps: optimiser steps.  batch: images a step.
    clip: largest norm of the gradient of the loss in nats a pixel.  anneal: share of the steps in which the weight of the
    KL divergence grows from 0 to 1 (Bowman et al. 2016).  jacobian: weight of the Jacobian penalty on the
    decoder's cell, for cells that are not well posed.  mirror: whether each image is used left to right as well; None: if it
    has colours.
    """

    images: int = 16384
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 1e-3
    warm_up: int = 50
    clip: float = 1.0
    anneal: float = 0.5
    jacobian: float = 0.0
    mirror: bool | None = None
    seed: int = 0


class Trainer(Trainable[VAE, Training]):
    """The state of a training: `step` optimiser steps done. Images stay on the CPU, a batch at a time goes to the device."""

    def __init__(self, images: Tensor, config: VAEConfig, training: Training, *, team: Team = Team()):
        images = chosen(images, training.images, batch=training.batch, seed=training.seed, mirror=training.mirror)
        if team.size * team.accumulate > 1:
            raise UserError("a VAE's pixel variance belongs to a whole batch: train it in one process and one part")
        torch.manual_seed(training.seed)
        model = vae(config)
        model.encoder.network.on_failure = "ignore"
        model.encoder.network.tol = SOLVE_TOL
        model.generator.calibrate(images)
        super().__init__(model, training, team)
        self.images = images
        self.loss = VAELoss(self.model, tol=SOLVE_TOL)
        self.order = Order(len(images), training.batch, training.seed)

    def noise(self, step: int) -> torch.Generator:
        """The noise of a step, by seed and step alone."""
        return torch.Generator().manual_seed(self.training.seed * 100003 + step)

    def advance(self) -> dict[str, float]:
        """One optimiser step; the figures that tell whether training is healthy."""
        training = self.training
        found, norm = self.descend(self.part, batch=training.batch)
        return {
            "step": self.step,
            "loss": float(found["bound"].mean()),
            "divergence": float(found["divergence"].mean()),
            "psnr": decibel(float(found["variance"].mean())),
            "residual_z": float(found["residual"].median()),
            "converged": float(found["converged"].mean()),
            "gradient_norm": float(norm),
        }

    def part(self, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the images at some places of this step's batch, all of them, and what was found of each."""
        training = self.training
        images = self.images[self.order.rows(self.step)[places]].to(self.device)
        bound, parts = self.loss(images, generator=self.noise(self.step))
        weight = min(1.0, (self.step + 1) / max(1.0, training.anneal * training.steps))
        # nats a pixel: of the same size for images of any size
        loss = (bound - (1 - weight) * parts.divergence) / images[0].numel()
        if training.jacobian:
            loss = loss + training.jacobian * self.penalty(parts.x, parts.solution.value)
        each = torch.ones(len(images), device=images.device)
        return loss, {
            "bound": bound.detach() * each,
            "divergence": parts.divergence.detach() * each,
            "variance": parts.variance * each,
            "residual": parts.solution.residual,
            "converged": parts.solution.converged.float(),
        }

    def penalty(self, x: Tensor, z: Any) -> Tensor:
        """Jacobian penalty at the solution, z held fixed: a surrogate (docs/method.md)."""
        f = self.model.generator.cell()
        return jacobian_penalty(lambda z: f(z, x), z, generator=self.noise(self.step)).mean()

    def finish(self) -> None:
        """Fit what searches for latents need: pixel variance, tangents, the density of the latents."""
        generator = torch.Generator().manual_seed(self.training.seed)
        rows = torch.randperm(len(self.images), generator=generator)[:FITTED_IMAGES]
        with images_bar("fitting what the finished model needs", total=len(rows)) as watch:
            fit_vae(self.model, self.images[rows].to(self.device), generator=generator, watch=watch)


SOLVE_TOL = 1e-3  # of the equilibria and their gradients in training


def make_trainer(
    data: str,
    training: Training,
    *,
    data_dir: str | None = None,
    latent: int | None = None,
    cell: str = "well_posed",
    preset: Preset = "small",
    size: int | None = None,
    team: Team = Team(),
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a command's options, and the configuration that rebuilds it."""
    with user_input():
        images = load_images(data, "train", root=data_dir, size=size)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        decoder = default_config(shape, latent=latent, cell=cell, preset=preset)
    config = VAEConfig.from_dict(decoder.to_dict() | {"encoder_channels": decoder.channels})
    saved = {
        "task": "vae",
        "data": data,
        "size": size,
        "model": config.to_dict(),
        "training": asdict(training),
    }
    return Trainer(images, config, training, team=team), saved
