"""`jiio train meta`, `jiio adapt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jiio.app.commands import Common, Train, open_model, text
from jiio.app.launch import team_of, train
from jiio.app.run_folder import UserError
from jiio.app.train_meta import Adaptation, Training, default_folder, make_trainer
from jiio.data.omniglot import Division
from jiio.models import ContextClassifier
from jiio.tasks.meta import PRIOR, Gradient

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class TrainMeta(Train):
    """Train a classifier that adapts to a few labelled examples, over tasks drawn from characters.

    Examples: jiio train meta --ways 5 --shots 1 --data-dir DATA
              jiio train meta --data digits
    """

    data: str = "omniglot"
    """omniglot, or digits (embedded: six of them and their rotations for training, the others for testing)."""

    ways: int = Training.ways
    """Classes of a task that the model is for."""
    shots: int = Training.shots
    """Labelled examples of each class."""
    train_ways: int | None = None
    """Classes of a training task; 20 or `ways`, whichever is more, otherwise."""
    queries: int = Training.queries
    """Unlabelled images of each class in a training task."""
    tasks: int = Training.tasks
    """Tasks of an optimiser step."""
    gradient: Gradient = Training.gradient
    """Outer gradient: exact needs a linear solve, first_order is cheaper and biased."""
    adaptation: Adaptation = Training.adaptation
    """joint, or a baseline: nested (implicit MAML), unrolled (MAML), none (a prototypical network)."""
    division: Division = Training.division
    """1200 characters of all alphabets for training, or the 964 of the original background set."""
    steps: int = Training.steps
    """Optimiser steps."""
    learning_rate: float = Training.learning_rate
    """At its highest; matrices take four times as much."""


def train_meta(options: TrainMeta) -> dict[str, Any]:
    """`jiio train meta`."""
    training = Training(
        ways=options.ways,
        shots=options.shots,
        train_ways=options.train_ways or max(20, options.ways),
        queries=options.queries,
        tasks=options.tasks,
        gradient=options.gradient,
        adaptation=options.adaptation,
        division=options.division,
        steps=options.steps,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    trainer, config = make_trainer(
        options.data, training, data_dir=text(options.data_dir), cell=options.cell, team=team_of(options)
    )
    return train(
        options, trainer, config, default=default_folder(options.data, options.ways, options.shots, options.seed)
    )


@dataclass(frozen=True, kw_only=True)
class Adapt(Common):
    """Label your own images from a few examples of each class.

    FOLDER has a sub-folder of examples for each class, named after it, and beside them the images to label.

    Examples: jiio adapt digits-5way1shot digits
              jiio adapt omniglot-5way1shot letters
    """

    run: Positional[str]
    """Run folder or the name of a packaged model."""
    folder: Positional[Path]
    """Folder with a sub-folder for each class, and the images to label."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("adapted.png")
    """Picture of examples and answers."""


def adapt(options: Adapt) -> dict[str, Any]:
    """`jiio adapt RUN FOLDER`."""
    from jiio.app.adapt_folder import adapt_folder

    folder, model, config = open_model(options.run, options.device)
    if not isinstance(model, ContextClassifier):
        raise UserError(f"{folder} is a run of {config['task']}, not of a model that adapts")
    prior = config.get("training", {}).get("prior", PRIOR)
    return adapt_folder(model, options.folder, options.output, device=options.device, prior=prior)
