"""`jiio train generation`: a generator trained by joint latent optimisation and the envelope gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app.run_folder import RunFolder, UserError
from jiio.data import load_images
from jiio.models import Generator, GeneratorConfig, generator
from jiio.regularize import jacobian_penalty
from jiio.tasks.generation import PRIOR, GenerationLoss, Ridge, fit_latents, tangent_statistics
from jiio.tasks.metrics import decibel


@dataclass(frozen=True)
class Training:
    """Options of a training that decide its result; saved in the run's config.json.

    images: training images used, chosen by the seed; 0 for all. A few thousand, met several times, let every inner solve
    start at the image's last latent.
    steps: optimiser steps.  batch: images a step.  joint_steps: of the inner solve of a batch.  rate: of its input step.
    jacobian: weight of the Jacobian penalty, for cells that are not well posed.
    """

    images: int = 16384
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 2e-3
    warm_up: int = 50
    joint_steps: int = 20
    rate: float = 0.3
    prior: float = PRIOR
    clip: float = 20.0
    jacobian: float = 0.0
    refresh_every: int = 50
    seed: int = 0


def default_config(
    shape: tuple[int, int, int], *, latent: int | None = None, cell: str = "well_posed"
) -> GeneratorConfig:
    """A generator for images of `shape`: small images keep their resolution, larger ones are decoded from half of it."""
    side = min(shape[1:])
    small = side < 16
    size = latent if latent is not None else 16 if small else 32 if side < 32 else 64
    return GeneratorConfig(
        image_shape=shape,
        latent=size,
        channels=(16, 32) if small else (32, 64),
        patch=1 if small else 2,
        cell="mdeq" if cell == "mdeq" else "well_posed",
    )


class Trainer:
    """The state of a training: `step` optimiser steps done, the last latents of every image."""

    def __init__(self, images: Tensor, config: GeneratorConfig, training: Training):
        if training.images:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(training.seed))
            images = images[order[: training.images]]
        if len(images) < training.batch:
            raise UserError(f"{len(images)} training images are fewer than a batch of {training.batch}")
        self.images, self.training = images, training
        torch.manual_seed(training.seed)
        self.model = generator(config)
        self.model.calibrate(images)
        self.loss = GenerationLoss(
            self.model, prior=training.prior, joint_steps=training.joint_steps, rate=training.rate
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=training.learning_rate, betas=(0.9, 0.99))
        self.latents = torch.zeros(len(images), config.latent)
        self.encoder = Ridge(len(self.model.encoder), config.latent, decay=ENCODER_DECAY)
        self.step = 0

    def rows(self) -> Tensor:
        """The images of this step; their order depends on seed and epoch alone."""
        size = self.training.batch
        per_epoch = len(self.images) // size
        epoch, place = divmod(self.step, per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.training.seed * 7919 + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator)
        return self._order[place * size : (place + 1) * size]

    def advance(self) -> dict[str, float]:
        """One optimiser step; the figures that tell whether training is healthy."""
        training, rows = self.training, self.rows()
        images = self.images[rows]
        if self.step % training.refresh_every == 0 or self.step in EARLY_REFRESH:
            self.refresh(images[:REFRESH_IMAGES])
        # once an image has been met, its last latent is nearer than a linear guess
        latents = self.latents[rows] if self.step >= len(self.images) // training.batch else self.model.guess(images)
        loss, solution = self.loss(images, latents)
        if training.jacobian:
            loss = loss + training.jacobian * self.penalty(solution.value)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        x = solution.value.x
        self.latents[rows] = x
        self.encoder.add(self.model.features(images), x)
        self.step += 1
        residual = solution.residual.median(0).values
        prior = 0.5 * training.prior * x.square().sum(1)
        return {
            "step": self.step,
            "loss": float(loss.detach()),
            "psnr": decibel(max(float(2 * (solution.cost - prior).mean()) / images[0].numel(), 1e-12)),
            "residual_z": float(residual[0]),
            "residual_mu": float(residual[1]),
            "residual_x": float(residual[2]),
            "converged": float(solution.converged.float().mean()),
            "tangent": float(torch.linalg.matrix_norm(self.model.tangent, 2)),
            "latent_norm": float(x.norm(dim=1).mean()),
            "gradient_norm": float(norm),
        }

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to 2 % of the full rate."""
        training = self.training
        warm = min(1.0, (self.step + 1) / training.warm_up)
        share = min(self.step / training.steps, 1.0)
        return training.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))

    def refresh(self, images: Tensor) -> None:
        """Refit the linear encoder, and blend in the tangent at the latents it guesses; random ones at first."""
        if self.step > 0:
            self.model.encoder.copy_(self.encoder.solve())
            latents = self.model.guess(images)
        else:
            generator = torch.Generator().manual_seed(self.training.seed)
            latents = torch.randn(len(images), self.model.config.latent, generator=generator)
        weight = 1.0 if self.step < 40 else 0.5
        tangent, spread = tangent_statistics(self.model, latents)
        self.model.tangent.lerp_(tangent, weight)
        self.model.spread.lerp_(spread, weight)

    def penalty(self, state: Any) -> Tensor:
        """Jacobian penalty at the solution, z held fixed: a surrogate (docs/method.md)."""
        f = self.model.cell()
        probe = torch.Generator().manual_seed(self.step)
        return jacobian_penalty(lambda z: f(z, state.x), state.z, generator=probe).mean()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "latents": self.latents,
            "encoder": {"square": self.encoder.square, "product": self.encoder.product, "count": self.encoder.count},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.step, self.latents = state["step"], state["latents"]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["encoder"].items():
            setattr(self.encoder, name, value)


# while the weights are young their curvature changes within a few steps
EARLY_REFRESH = (5, 10, 20, 30, 40, 60, 80)
REFRESH_IMAGES = 8
ENCODER_DECAY = 0.98  # of a batch's weight at each later one: some 3000 images count


def run_training(
    folder: RunFolder, trainer: Trainer, *, checkpoint_every: int = 200, log_every: int = 10
) -> Iterator[dict[str, float]]:
    """Train to the end, yielding the figures of every step; checkpoints on the way and when interrupted."""
    began = time.perf_counter()
    try:
        while trainer.step < trainer.training.steps:
            figures = trainer.advance() | {"seconds": time.perf_counter() - began}
            if trainer.step % log_every == 0 or trainer.step == 1:
                folder.log(figures)
            if trainer.step % checkpoint_every == 0:
                folder.save_checkpoint(trainer.step, trainer.model, trainer.state())
            yield figures
    except (KeyboardInterrupt, GeneratorExit):
        folder.save_checkpoint(trainer.step, trainer.model, trainer.state())
        raise
    finish(trainer)
    folder.save_checkpoint(trainer.step, trainer.model, trainer.state())
    folder.save_weights(trainer.model)


def finish(trainer: Trainer) -> None:
    """Fit what restoration needs: average curvature, a Gaussian of the latents, the residual variance of a pixel."""
    generator = torch.Generator().manual_seed(trainer.training.seed)
    rows = torch.randperm(len(trainer.images), generator=generator)[:1000]
    fit_latents(trainer.model, trainer.images[rows], prior=trainer.training.prior, latent=trainer.latents[rows])


def make_trainer(
    data: str, training: Training, *, data_dir: str | None, latent: int | None, cell: str, size: int | None
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a command's options, and the configuration that rebuilds it."""
    images = load_images(data, "train", root=data_dir, size=size)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = default_config(shape, latent=latent, cell=cell)
    saved = {
        "task": "generation",
        "data": data,
        "size": size,
        "model": config.to_dict(),
        "training": asdict(training),
    }
    return Trainer(images, config, training), saved


def default_folder(data: str, seed: int) -> Path:
    """runs/generation-DATA-SEED."""
    name = data.removeprefix("folder:").rstrip("/").split("/")[-1]
    return Path("runs") / f"generation-{name}-{seed}"


__all__ = [
    "Generator",
    "Trainer",
    "Training",
    "default_config",
    "default_folder",
    "finish",
    "make_trainer",
    "run_training",
]
