"""`jiio train generation` and its baseline, `jiio train vae`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro

from jiio.app import train_generation as generation
from jiio.app import train_vae as vae
from jiio.app.commands import Train, text
from jiio.app.launch import team_of, train
from jiio.app.run_folder import UserError
from jiio.app.training import Watch
from jiio.data import resized

Made = TypeVar("Made")


@dataclass(frozen=True)
class TrainImages(Train):
    """Options of trainings of a generator's decoder."""

    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, faces64, celeba, or folder:PATH for a folder of images."""
    latent: int | None = None
    """Entries of the latent vector; 16, 32 or 64 by the images' size otherwise."""
    preset: generation.Preset = "small"
    """small: what two CPU cores train in an hour; full: the paper's four scales of 32 to 256 channels, for 32x32 and 64x64."""
    size: int | None = None
    """Side to which images of celeba (64 otherwise) and of a folder (32) are resized."""
    steps: int = generation.Training.steps
    """Optimiser steps."""
    images: int = generation.Training.images
    """Training images used, chosen by the seed; 0 for all."""
    mirror: bool | None = None
    """Whether each image is used left to right as well, in twice the memory; those with colours are, if nothing is said."""
    batch: int = generation.Training.batch
    """Images a step."""
    learning_rate: float = generation.Training.learning_rate
    """At its highest; matrices take four times as much."""
    jacobian: float | None = None
    """Weight of the Jacobian penalty; 1.0 for mdeq, 0 for well_posed otherwise."""

    @property
    def penalty(self) -> float:
        """The weight of the Jacobian penalty."""
        return float(self.cell == "mdeq") if self.jacobian is None else self.jacobian

    def made(self, make_trainer: Callable[..., Made], training: object) -> Made:
        """What a training's `make_trainer` makes of these options."""
        if self.size is not None and not resized(self.data):
            raise UserError(f"--size is for celeba and folders: the images of {self.data} have a size of their own")
        return make_trainer(
            self.data,
            training,
            data_dir=text(self.data_dir),
            latent=self.latent,
            cell=self.cell,
            preset=self.preset,
            size=self.size,
            team=team_of(self),
        )


@dataclass(frozen=True)
class TrainGeneration(TrainImages):
    """Train a generator of images by joint latent optimisation. Ctrl-C saves; --resume goes on.

    Example: jiio train generation --data mnist --data-dir DATA
    """

    joint_steps: int = generation.Training.joint_steps
    """Joint steps of the inner solve of a batch."""
    precision: generation.Precision = "32"
    """Of the cell; bf16 is bfloat16, with everything else in float32."""
    samples_every: int = 500
    """Steps between pictures of reconstructions and samples, samples-STEP.png in the run folder; 0 for none."""


def train_generation(options: TrainGeneration) -> dict[str, Any]:
    """`jiio train generation`."""
    training = generation.Training(
        images=options.images,
        steps=options.steps,
        batch=options.batch,
        joint_steps=options.joint_steps,
        learning_rate=options.learning_rate,
        jacobian=options.penalty,
        mirror=options.mirror,
        precision=options.precision,
        seed=options.seed,
    )
    trainer, config = options.made(generation.make_trainer, training)
    folder = options.output or generation.default_folder(options.data, options.seed)

    def picture(figures: dict[str, float]) -> None:
        from jiio.app.training_samples import draw_samples  # and with it matplotlib

        draw_samples(trainer, folder / f"samples-{trainer.step}.png")

    watches = [Watch(options.samples_every, picture)] if options.samples_every else []
    return train(options, trainer, config, default=folder, watches=watches)


@dataclass(frozen=True)
class TrainVAE(TrainImages):
    """Train a variational autoencoder with the generator's decoder and an equilibrium encoder: the baseline of generation.

    Example: jiio train vae --data mnist --data-dir DATA
    """

    learning_rate: float = vae.Training.learning_rate
    """At its highest; matrices take four times as much."""
    accumulate: tyro.conf.Suppress[int] = 1  # a batch can't be split: its pixel variance is that of all of it


def train_vae(options: TrainVAE) -> dict[str, Any]:
    """`jiio train vae`."""
    training = vae.Training(
        images=options.images,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        jacobian=options.penalty,
        mirror=options.mirror,
        seed=options.seed,
    )
    trainer, config = options.made(vae.make_trainer, training)
    folder = generation.default_folder(options.data, options.seed, task="vae")
    return train(options, trainer, config, default=folder)
