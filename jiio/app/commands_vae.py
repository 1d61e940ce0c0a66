"""`jiio train vae`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jiio.app.commands import Train, text
from jiio.app.launch import team_of, train
from jiio.app.train_generation import default_folder
from jiio.app.train_vae import Training, make_trainer


@dataclass(frozen=True)
class TrainVAE(Train):
    """Train a variational autoencoder with the generator's decoder and an equilibrium encoder: the baseline of generation.

    Example: jiio train vae --data mnist --data-dir DATA
    """

    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, faces64, celeba, or folder:PATH for a folder of images."""
    latent: int | None = None
    """Entries of the latent vector; 16, 32 or 64 by the images' size otherwise."""
    preset: Literal["small", "full"] = "small"
    """Size of encoder and decoder: two scales, or four of 32 to 256 channels as in the paper."""
    size: int | None = None
    """Side to which images of celeba (64 otherwise) and of a folder (32) are resized."""
    steps: int = 1500
    """Optimiser steps."""
    images: int = 16384
    """Training images used, chosen by the seed; 0 for all."""
    batch: int = 64
    """Images a step."""
    learning_rate: float = Training.learning_rate
    """Of Adam, at its highest."""
    jacobian: float | None = None
    """Weight of the Jacobian penalty; 1.0 for mdeq, 0 for well_posed otherwise."""


def train_vae(options: TrainVAE) -> dict[str, Any]:
    """`jiio train vae`."""
    training = Training(
        images=options.images,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        jacobian=options.jacobian if options.jacobian is not None else float(options.cell == "mdeq"),
        seed=options.seed,
    )
    trainer, config = make_trainer(
        options.data,
        training,
        data_dir=text(options.data_dir),
        latent=options.latent,
        cell=options.cell,
        preset=options.preset,
        size=options.size,
        team=team_of(options),
    )
    return train(options, trainer, config, default=default_folder(options.data, options.seed, task="vae"))
