"""A tiny generator of digits in a run folder, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from jiio.app.run_folder import RunFolder
from jiio.app.train_generation import Trainer, Training
from jiio.data import load_images
from jiio.models import GeneratorConfig, generator
from jiio.tasks.latent_fit import fit_latents

CONFIG = GeneratorConfig(image_shape=(1, 8, 8), latent=4, channels=(4, 8), patch=1)


def digits(count: int) -> torch.Tensor:
    """The first training digits."""
    return load_images("digits", "train")[:count]


def tiny_run(path: Path) -> RunFolder:
    """A run of an untrained generator whose latents have been fitted, as a training would leave it."""
    torch.manual_seed(0)
    model = generator(CONFIG)
    model.calibrate(digits(64))
    fit_latents(model, digits(64))
    folder = RunFolder(path)
    folder.create({"task": "generation", "data": "digits", "size": None, "model": CONFIG.to_dict()})
    folder.log({"step": 1})
    folder.save_weights(model)
    return folder


def tiny_trainer(*, steps: int = 12) -> Trainer:
    """A training of a few short epochs."""
    training = Training(images=64, steps=steps, batch=16, joint_steps=6, seed=3)
    return Trainer(digits(100), CONFIG, training)
