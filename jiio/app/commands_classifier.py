"""`jiio train adversarial`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jiio.app.commands import Common, text, train
from jiio.app.run_folder import RunFolder
from jiio.app.train_classifier import RADII, Training, default_folder, make_trainer


@dataclass(frozen=True)
class TrainAdversarial(Common):
    """Train a classifier against attacks within a norm ball, each solved jointly with the equilibrium.

    Example: jiio train adversarial --data mnist --data-dir DATA
    """

    data: str = "digits"
    """digits, mnist, fashion-mnist or cifar10."""
    data_dir: Path | None = None
    """Folder that holds the data sets; the environment variable JIIO_DATA_DIR otherwise."""
    output: Path | None = None
    """Run folder; runs/adversarial-DATA-SEED otherwise."""
    resume: bool = False
    """Go on from the last checkpoint of the same command."""
    overwrite: bool = False
    """Delete the run that the folder holds already."""
    attack: Literal["joint", "pgd", "none"] = "joint"
    """joint; pgd, the baseline with a full solve at each step; none, clean training."""
    attack_steps: int = 10
    """Steps of the attack on each batch."""
    warm: bool = False
    """pgd only: start each solve where the last one ended."""
    solve_tol: float = 1e-2
    """pgd only: relative residual of each solve."""
    norm: Literal["l2", "linf"] = "l2"
    """Norm of the ball."""
    radius: float | None = None
    """Radius, pixels in [0, 1]; 0.7 for digits, 1 for mnist, 0.5 otherwise."""
    clean: float = 0.0
    """Share of the clean images in the loss."""
    cell: Literal["well_posed", "mdeq"] = "well_posed"
    """well_posed is a contraction by construction; mdeq is the paper's cell."""
    steps: int = 1500
    """Optimiser steps."""
    batch: int = 64
    """Images a step."""
    learning_rate: float = 4e-3
    """Of Adam, at its highest."""


def train_adversarial(options: TrainAdversarial) -> dict[str, Any]:
    """`jiio train adversarial`."""
    training = Training(
        attack=options.attack,
        attack_steps=options.attack_steps,
        warm=options.warm,
        solve_tol=options.solve_tol,
        norm=options.norm,
        radius=options.radius if options.radius is not None else RADII.get(options.data, 0.5),
        clean=options.clean,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        flip=options.data == "cifar10",
        seed=options.seed,
    )
    trainer, config = make_trainer(
        options.data, training, data_dir=text(options.data_dir), cell=options.cell, device=options.device
    )
    folder = RunFolder(options.output or default_folder(options.data, options.seed))
    train(folder, trainer, config, resume=options.resume, overwrite=options.overwrite)
    return {"run": str(folder.path), "steps": trainer.step}
