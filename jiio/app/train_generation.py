"""`jiio train generation`: a generator trained by joint latent optimisation and the envelope gradient."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jiio import tree
from jiio.app.progress import images_bar
from jiio.app.run_folder import user_input
from jiio.app.team import Team
from jiio.app.training import Order, Trainable, chosen
from jiio.data import load_images
from jiio.models import Generator, GeneratorConfig, generator
from jiio.regularize import jacobian_penalty
from jiio.tasks.generation import PRIOR, RATE, GenerationLoss
from jiio.tasks.image_rule import Tangents, TangentStatistics, keep, tangents
from jiio.tasks.latent_fit import Ridge, fit_latents
from jiio.tasks.metrics import decibel

Preset = Literal["small", "full"]
FULL_CHANNELS = (32, 64, 128, 256)  # of the four scales of the JIIO paper's networks for CIFAR-10 and CelebA
FULL_SIDE = 32  # of the finest scale
SMALL_SIDE = 16  # of the finest scale of the small preset, at least, where images are twice as large or more
Precision = Literal["32", "bf16"]
COMPUTED_IN: dict[Precision, torch.dtype | None] = {"32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Training:
    """Options of a training that decide its result; saved in the run's config.json.

    images: training images used, chosen by the seed; 0 for all. A few thousand, met several times, let every inner solve
    start at the image's last latent.
    steps: optimiser steps.  batch: images a step.  joint_steps: of the inner solve of a batch.  rate: of its input step.
    jacobian: weight of the Jacobian penalty, for cells that are not well posed.  mirror: whether each image is used left to
    right as well; None: if it has colours.  precision: of the cell, in which bf16 is bfloat16; all else is done in float32.
    """

    images: int = 16384
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 2e-3
    warm_up: int = 50
    joint_steps: int = 20
    rate: float = RATE
    prior: float = PRIOR
    clip: float = 20.0
    jacobian: float = 0.0
    mirror: bool | None = None
    precision: Precision = "32"
    seed: int = 0


def default_config(
    shape: tuple[int, int, int], *, latent: int | None = None, cell: str = "well_posed", preset: Preset = "small"
) -> GeneratorConfig:
    """A generator for images of `shape`.

    small: two scales; images below 16x16 keep their resolution, others are decoded from a half of it, those of 64 from a
    quarter. What two CPU cores train in an hour.
    full: four scales of 32 to 256 channels, the finest at a resolution of 32x32 or all of a smaller image's.
    """
    side = min(shape[1:])
    tiny = side < 16
    channels, patch = ((16, 32), 1) if tiny else ((32, 64), max(2, 2 ** int(math.log2(side / SMALL_SIDE))))
    if preset == "full":
        channels, patch = FULL_CHANNELS, max(1, side // FULL_SIDE)
        if any(length % (8 * patch) for length in shape[1:]):
            raise ValueError(
                f"four scales need sides that divide by {8 * patch}, the images are {shape[1]}x{shape[2]}: use --preset small"
            )
    return GeneratorConfig(
        image_shape=shape,
        latent=latent if latent is not None else 16 if tiny else 32 if side < 32 else 64,
        channels=channels,
        patch=patch,
        cell="mdeq" if cell == "mdeq" else "well_posed",
    )


class Trainer(Trainable[Generator, Training]):
    """The state of a training: `step` optimiser steps done, the last latents of every image. Images and latents stay on
    the CPU, a batch at a time goes to the device.

    Every process of the team holds all latents and statistics: each solves its share of a batch, and what was found of
    the whole batch enters them in all processes alike."""

    def __init__(self, images: Tensor, config: GeneratorConfig, training: Training, *, team: Team = Team()):
        images = chosen(images, training.images, batch=training.batch, seed=training.seed, mirror=training.mirror)
        torch.manual_seed(training.seed)
        model = generator(config)
        model.calibrate(images)
        super().__init__(model, training, team)
        self.images = images
        self.loss = GenerationLoss(
            self.model,
            prior=training.prior,
            joint_steps=training.joint_steps,
            rate=training.rate,
            compute_dtype=COMPUTED_IN[training.precision],
        )
        self.latents = torch.zeros(len(images), config.latent)
        self.encoder = Ridge(len(self.model.encoder) + config.latent, config.latent, decay=ENCODER_DECAY)
        self.guess = torch.zeros(len(self.encoder.square), config.latent, device=self.device)
        seeded = torch.Generator().manual_seed(training.seed)
        self.recent = torch.randn(REFRESH_IMAGES, config.latent, generator=seeded).to(self.device)
        self.statistics: TangentStatistics | None = None
        self.order = Order(len(images), training.batch, training.seed)

    def rows(self) -> Tensor:
        """The images of this step."""
        return self.order.rows(self.step)

    def advance(self) -> dict[str, float]:
        """One optimiser step; the figures that tell whether training is healthy."""
        training, rows = self.training, self.rows()
        self.refresh()
        if self.step >= (1 - FINAL_SHARE) * training.steps:
            self.loss.joint_steps = max(training.joint_steps, FINAL_STEPS)
        found, norm = self.descend(lambda places: self.part(rows, places), batch=len(rows))
        x, residual = found["x"], found["residual"].median(0).values
        self.latents[rows] = x.cpu()
        self.recent = x[:REFRESH_IMAGES]
        self.encoder.add(found["seen"], x)
        return {
            "step": self.step,
            "loss": float(found["loss"].mean()),
            "psnr": decibel(max(float(found["error"].mean()), 1e-12)),
            "residual_z": float(residual[0]),
            "residual_mu": float(residual[1]),
            "residual_x": float(residual[2]),
            "converged": float(found["converged"].mean()),
            "tangent": float(torch.linalg.matrix_norm(self.model.tangent, 2)),
            "latent_norm": float(x.norm(dim=1).mean()),
            "gradient_norm": float(norm),
        }

    def part(self, rows: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the images at some places of the batch `rows`, and what was found of each of them."""
        images, seen = self.seen(rows[places])
        loss, solution = self.loss(images, seen @ self.guess)
        if self.training.jacobian:
            loss = loss + self.training.jacobian * self.penalty(solution.value, places, len(rows))
        x = solution.value.x
        squares = 2 * (solution.cost - 0.5 * self.training.prior * x.square().sum(1))
        return loss, {
            "x": x,
            "seen": seen,
            "error": squares / images[0].numel(),
            "residual": solution.residual,
            "converged": solution.converged.float(),
        }

    def seen(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and what their first latents are guessed from: the images and the last latents.

        An image's last latent belongs to weights that have moved on: where it would be now is a linear guess from both
        (started at the last latents themselves, the loss of MNIST's second epoch doubled).
        """
        images, last = self.images[rows].to(self.device), self.latents[rows].to(self.device)
        return images, torch.cat((self.model.features(images), last), dim=1)

    def refresh(self) -> None:
        """Refit the linear guess, and the tangents at the latents of the last batch; random ones at first."""
        if self.step > 0:
            self.guess = self.encoder.solve().to(self.device)
        found, model = self.tangents(), self.model
        statistics, z = TangentStatistics.of(found), found.z
        if self.statistics is not None:
            statistics = self.statistics.mixed(statistics, REFRESH_WEIGHT)
            z = tree.apply(lambda old, new: torch.lerp(old[0], new, REFRESH_WEIGHT), model.tangent_of_z(), z)
        self.statistics = statistics
        keep(model, statistics)
        model.keep_tangent_of_z(z)

    def tangents(self) -> Tangents:
        """The tangents at the last latents; each process computes those of its share of the directions."""
        units, team = torch.eye(self.model.config.latent).to(self.recent), self.team
        if len(units) % team.size:
            return tangents(self.model, self.recent)
        found = tangents(self.model, self.recent, team.share(units))
        image = team.gather(found.image.permute(2, 0, 1)).permute(1, 2, 0)
        return Tangents(image, found.weight, tree.apply(team.gather, found.z))

    def penalty(self, state: Any, places: Tensor, batch: int) -> Tensor:
        """Jacobian penalty at the solution, z held fixed: a surrogate (docs/method.md)."""
        f = self.model.cell()
        generator = torch.Generator().manual_seed(self.step)

        def draw(like: Tensor) -> Tensor:  # for the whole batch, so that a sample's does not depend on how it is split
            return torch.randn(batch, *like.shape[1:], generator=generator)[places].to(like)

        return jacobian_penalty(lambda z: f(z, state.x), state.z, draw=draw).mean()

    def finish(self) -> None:
        """Fit what restoration needs: average curvature, the density of the latents, the residual variance of a pixel."""
        generator = torch.Generator().manual_seed(self.training.seed)
        rows = torch.randperm(len(self.images), generator=generator)[:FITTED_IMAGES]
        images, seen = self.seen(rows)
        with images_bar("fitting what the finished model needs", total=len(rows)) as watch:
            fit_latents(self.model, images, prior=self.training.prior, latent=seen @ self.guess, watch=watch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimiser."""
        return {
            "latents": self.latents,
            "recent": self.recent.cpu().clone(),
            "statistics": None if self.statistics is None else tuple(self.statistics),
            "guess": self.guess,
            "encoder": {"square": self.encoder.square, "product": self.encoder.product, "count": self.encoder.count},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.latents, self.recent = state["latents"], state["recent"].to(self.device)
        if state["statistics"] is not None:
            self.statistics = TangentStatistics(*(part.to(self.device) for part in state["statistics"]))
        self.guess = state["guess"].to(self.device)
        for name, value in state["encoder"].items():
            setattr(self.encoder, name, value)


# The end of a training, where small steps can use an exact gradient, solves its batches until they converge.
FINAL_SHARE, FINAL_STEPS = 0.1, 100
# A training turns the latent map by a tenth or so in eight steps, and preconditioned steps overshoot on stale tangents: one
# image at every step is worth more than many seldom (docs/experiments.md).
REFRESH_IMAGES = 1
REFRESH_WEIGHT = 0.3
FITTED_IMAGES = 4096
ENCODER_DECAY = 0.98  # of a batch's weight at each later one: some 3000 images count


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
        config = default_config(shape, latent=latent, cell=cell, preset=preset)
    saved = {
        "task": "generation",
        "data": data,
        "size": size,
        "model": config.to_dict(),
        "training": asdict(training),
    }
    return Trainer(images, config, training, team=team), saved


def default_folder(data: str, seed: int, *, task: str = "generation") -> Path:
    """runs/TASK-DATA-SEED."""
    name = data.removeprefix("folder:").rstrip("/").split("/")[-1]
    return Path("runs") / f"{task}-{name}-{seed}"
