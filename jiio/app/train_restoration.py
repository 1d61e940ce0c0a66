"""`jiio train restoration`: a trained generator, trained further through the restoration of damaged images."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app.run_folder import user_input
from jiio.app.team import Team
from jiio.app.training import Order, Trainable, chosen
from jiio.models import Generator
from jiio.tasks.image_rule import refit_tangent
from jiio.tasks.measurement import Measurement, damage, measure
from jiio.tasks.metrics import decibel
from jiio.tasks.restoration import DamagedLoss, Gradient


@dataclass(frozen=True)
class RestorationTraining:
    """Options of a training through a damage that decide its result; saved in the run's config.json.

    images: training images used, chosen by the seed; 0 for all. Each gets a new draw of the damage in every epoch.
    steps: optimiser steps.  batch: images a step.  joint_steps: of the solve of a batch.
    """

    damage: str = "hole"
    gradient: Gradient = "exact"
    images: int = 16384
    steps: int = 200
    batch: int = 64
    learning_rate: float = 1e-4
    warm_up: int = 20
    joint_steps: int = 100
    clip: float = 20.0
    refresh_every: int = 10
    seed: int = 0


class RestorationTrainer(Trainable[Generator, RestorationTraining]):
    """The state of a training: `step` optimiser steps done. The outer loss is on the clean image, so its gradient goes
    through the solve: exactly, or with the latents held constant. The density of the latents and the residual variance stay
    as they are."""

    def __init__(self, model: Generator, images: Tensor, training: RestorationTraining, *, team: Team = Team()):
        images = chosen(images, training.images, batch=training.batch, seed=training.seed)
        super().__init__(copy.deepcopy(model).requires_grad_(), training, team)
        self.images = images
        self.operator, self.sigma = damage(training.damage)
        self.loss = DamagedLoss(self.model, gradient=training.gradient, joint_steps=training.joint_steps)
        self.order = Order(len(images), training.batch, training.seed)

    def damaged(self, rows: Tensor) -> Measurement:
        """The images `rows` as this epoch damages them."""
        epoch = self.step // (len(self.images) // self.training.batch)
        seed = self.training.seed * 7919 + epoch
        drawn = measure(self.operator, self.images[rows], sigma=self.sigma, ids=rows.tolist(), seed=seed)
        return drawn.to(self.device)

    def advance(self) -> dict[str, float]:
        """One optimiser step; the figures that tell whether training is healthy."""
        training, rows = self.training, self.order.rows(self.step)
        found, norm = self.descend(lambda places: self.part(rows[places]), batch=len(rows))
        if self.step % training.refresh_every == 0:
            refit_tangent(self.model, found["x"])
        loss, residual = float(found["loss"].mean()), found["residual"].median(0).values
        return {
            "step": self.step,
            "loss": loss,
            "psnr": decibel(max(2 * loss / self.images[0].numel(), 1e-12)),
            "residual_z": float(residual[0]),
            "residual_mu": float(residual[1]),
            "residual_x": float(residual[2]),
            "converged": float(found["converged"].mean()),
            "evaluations": float(found["evaluations"].mean()),
            "gradient_norm": float(norm),
        }

    def part(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the images `rows`, and what was found of each of them."""
        loss, solution = self.loss(self.images[rows].to(self.device), self.damaged(rows))
        each = torch.ones(len(rows), device=self.device)
        return loss, {
            "x": solution.value.x,
            "residual": solution.residual,
            "converged": solution.converged.float(),
            "evaluations": solution.work.f / len(rows) * each,
        }


def make_trainer(
    model: Generator,
    images: Tensor,
    training: RestorationTraining,
    *,
    run: str,
    config: dict[str, Any],
    team: Team = Team(),
) -> tuple[RestorationTrainer, dict[str, Any]]:
    """The trainer of a command's options, and the configuration that rebuilds it: that of the generator `run` which it
    begins with, and how it went on."""
    with user_input():
        damage(training.damage)[0].draw(model.config.image_shape, torch.Generator())
    trainer = RestorationTrainer(model, images, training, team=team)
    return trainer, config | {"restoration": {"run": run} | asdict(training)}


def default_folder(run: Path, training: RestorationTraining) -> Path:
    """runs/restoration-RUN-DAMAGE-GRADIENT-SEED."""
    name = f"restoration-{run.name}-{training.damage}-{training.gradient.replace('_', '-')}-{training.seed}"
    return Path("runs") / name
