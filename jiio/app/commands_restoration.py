"""`jiio train restoration RUN`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from jiio.app.commands import WithRun, images_of, open_generator
from jiio.app.launch import team_of, train
from jiio.app.run_folder import UserError
from jiio.app.train_restoration import RestorationTraining, default_folder, make_trainer
from jiio.tasks.restoration import Gradient

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class TrainRestoration(WithRun):
    """Train a generator further through the restoration of a damage: the loss is on the clean image. The result is a run
    like the generator's. Ctrl-C saves; --resume goes on.

    Example: jiio train restoration digits-generator --damage hole --gradient exact --steps 200
    """

    run: Positional[str] = "digits-generator"
    """Run folder or the name of a packaged model to begin with."""
    damage: str = RestorationTraining.damage
    """hole, pixels, blur, downsample, superresolution, or noise-0.2 (any level)."""
    gradient: Gradient = RestorationTraining.gradient
    """exact differentiates through the solve; first_order holds the latents constant, which is cheaper and biased."""
    steps: int = RestorationTraining.steps
    """Optimiser steps."""
    images: int = RestorationTraining.images
    """Training images used, chosen by the seed; 0 for all."""
    batch: int = RestorationTraining.batch
    """Images a step."""
    joint_steps: int = RestorationTraining.joint_steps
    """Joint steps of the solve of a batch, at most."""
    learning_rate: float = RestorationTraining.learning_rate
    """At its highest; matrices take four times as much."""


def train_restoration(options: TrainRestoration) -> dict[str, Any]:
    """`jiio train restoration RUN`."""
    folder, model, config = open_generator(options.run, options.device)
    if config["task"] != "generation":
        raise UserError(f"{folder} is a run of {config['task']}: only a generator is trained further")
    training = RestorationTraining(
        damage=options.damage,
        gradient=options.gradient,
        images=options.images,
        steps=options.steps,
        batch=options.batch,
        joint_steps=options.joint_steps,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    images = images_of(config, "train", options.data_dir)
    trainer, saved = make_trainer(model, images, training, run=options.run, config=config, team=team_of(options))
    return train(options, trainer, saved, default=default_folder(folder, training))
