"""A tiny generator of digits in a run folder, and trainings that are left and taken up again, for the tests of the command
line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from jiio.app.run_folder import RunFolder
from jiio.app.train_generation import Trainer, Training
from jiio.app.training import Trainable, run_training
from jiio.data import load_images
from jiio.models import GeneratorConfig, generator
from jiio.tasks.latent_fit import fit_latents

AnyTrainer = TypeVar("AnyTrainer", bound=Trainable[Any, Any])
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


def tiny_trainer(*, steps: int = 12, learning_rate: float = 2e-3) -> Trainer:
    """A training of a few short epochs."""
    training = Training(images=64, steps=steps, batch=16, joint_steps=6, seed=3, learning_rate=learning_rate)
    return Trainer(digits(100), CONFIG, training)


def trained(folder: Path, trainer: AnyTrainer, *, stop: int | None = None) -> AnyTrainer:
    """The training, carried on to its end, or left after `stop` steps as an interrupt leaves it."""
    figures = run_training(RunFolder(folder), trainer, checkpoint_every=10**9, log_every=1)
    for now in figures:
        if now["step"] == stop:
            figures.close()
    return trainer


def whole_and_resumed(make: Callable[[], AnyTrainer], folder: Path, *, stop: int) -> tuple[AnyTrainer, AnyTrainer]:
    """One training in one go and one that was left after `stop` steps and taken up again in `folder` / "resumed"; their
    weights are the same to the bit."""
    whole, resumed = trained(folder / "whole", make()), make()
    assert trained(folder / "resumed", make(), stop=stop).step == stop
    state, _ = RunFolder(folder / "resumed").load_checkpoint(resumed.model)
    assert state is not None
    resumed.resume(state)
    assert resumed.step == stop
    trained(folder / "resumed", resumed)
    lines = (folder / "resumed" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds)  # of the whole training, not from the resume on
    weights = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    return whole, resumed
