"""`jiio train adversarial`, `jiio attack`, `jiio audit`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from jiio.app.commands import Common, Train, WithData, open_model, own_run, text
from jiio.app.launch import team_of, train
from jiio.app.progress import stages
from jiio.app.run_folder import RunFolder, UserError, user_input
from jiio.app.table import console
from jiio.app.train_classifier import RADII, Attacker, Training, default_folder, make_trainer
from jiio.data import load_images, load_labels
from jiio.models import Classifier
from jiio.tasks.threat import Norm, Threat

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class TrainAdversarial(Train):
    """Train a classifier against attacks within a norm ball, each solved jointly with the equilibrium.

    Example: jiio train adversarial --data mnist --data-dir DATA
    """

    data: str = "digits"
    """digits, mnist, fashion-mnist or cifar10."""
    attack: Attacker = Training.attack
    """joint; pgd, the baseline with a full solve at each step; none, clean training."""
    attack_steps: int = Training.attack_steps
    """Steps of the attack on each batch."""
    warm: bool = Training.warm
    """pgd only: start each solve where the last one ended."""
    solve_tol: float = Training.solve_tol
    """Relative residual of the solves within an attack."""
    norm: Norm = Training.norm
    """Norm of the ball."""
    radius: float | None = None
    """Radius, pixels in [0, 1]; of l2 0.7 for digits, 1 for mnist, 0.5 otherwise; linf needs one, say 0.1."""
    clean: float = Training.clean
    """Share of the clean images in the loss, less than 1."""
    steps: int = Training.steps
    """Optimiser steps."""
    batch: int = Training.batch
    """Images a step."""
    learning_rate: float = Training.learning_rate
    """At its highest; matrices take four times as much."""


def train_adversarial(options: TrainAdversarial) -> dict[str, Any]:
    """`jiio train adversarial`."""
    if options.norm == "linf" and options.radius is None:
        raise UserError("--norm linf needs a --radius, say 0.1: that of l2 would let an attack repaint the image")
    if not 0 <= options.clean < 1:
        raise UserError(f"--clean must lie in [0, 1), got {options.clean}; --attack none trains on clean images alone")
    if options.warm and options.attack != "pgd":
        raise UserError(
            f"--warm is for --attack pgd, whose solves follow one another: --attack {options.attack} has none"
        )
    if options.clean and options.attack == "none":
        raise UserError(
            "--clean is a share beside attacked images: --attack none trains on clean images alone, leave it out"
        )
    for name in ("attack_steps", "solve_tol"):
        if options.attack == "none" and getattr(options, name) != getattr(TrainAdversarial, name):
            raise UserError(f"--{name.replace('_', '-')} is of an attack, and --attack none has none: leave it out")
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
        options.data, training, data_dir=text(options.data_dir), cell=options.cell, team=team_of(options)
    )
    return train(options, trainer, config, default=default_folder(options.data, options.seed))


@dataclass(frozen=True, kw_only=True)
class AttackFiles(Common):
    """Attack image files: does the strongest change found within a radius make a classifier err?

    Example: jiio attack mnist-classifier digit.png --radius 2
    """

    run: Positional[str]
    """Run folder or the name of a packaged model."""
    images: Positional[tuple[Path, ...]]
    """Image files of the size the model was trained on."""
    radius: float | None = None
    """Radius of the ball; that of the training otherwise."""
    target: int | None = None
    """The class that the attacked images shall be taken for, images that are already left out; any other than the model's own
    answer otherwise."""
    restarts: int = 5
    """Solves of each image, all but the first from random places."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("attacked")
    """Folder for the attacked files and a picture beside the originals."""


def attack_files(options: AttackFiles) -> dict[str, Any]:
    """`jiio attack RUN IMAGE...`."""
    from jiio.app.attack_files import PICTURE, attack_and_write
    from jiio.app.restore import read_images, result_files

    if not options.images:
        raise UserError("name at least one image file")
    _, model, config = open_classifier(options.run, options.device)
    if options.target is not None and not 0 <= options.target < model.config.classes:
        raise UserError(f"--target must lie between 0 and {model.config.classes - 1}, got {options.target}")
    targets = result_files(options.images, options.output, "attacked", picture=PICTURE)
    with user_input():
        images = read_images(options.images, model.config.image_shape)
    return attack_and_write(
        model, options.images, images.to(options.device), threat_of(config, options.radius), targets,
        target=options.target, restarts=options.restarts, seed=options.seed,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AuditRun(WithData):
    """Does a classifier only look robust? Gradients, radii, step sizes, tolerances, unrolled, transferred, gradient-free.

    Example: jiio audit digits-classifier
    """

    run: Positional[str] = "digits-classifier"
    """Run folder or the name of a packaged model."""
    images: int = 200
    """Test images, chosen by a fixed seed."""
    radius: float | None = None
    """Radius of the ball; that of the training otherwise."""


def audit_run(options: AuditRun) -> dict[str, Any]:
    """`jiio audit RUN`."""
    from jiio.app.audit import show_audit
    from jiio.app.evaluate_classifier import EVALUATION_TOL, solved_to
    from jiio.tasks.masking import audit, surrogate

    if options.images < 1:
        raise UserError(f"--images must be at least 1, got {options.images}")
    folder, model, config = open_classifier(options.run, options.device)
    images, labels = labelled(config, "test", options.data_dir)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: options.images]
    threat = threat_of(config, options.radius)
    with stages("another model") as watch, solved_to(model, EVALUATION_TOL):
        other = surrogate(*labelled(config, "train", options.data_dir), seed=options.seed).to(options.device)
        found = audit(
            model, images[rows].to(options.device), labels[rows].to(options.device), threat, other=other, watch=watch
        )
    show_audit(found)
    result = {"images": len(rows), "threat": {"norm": threat.norm, "radius": threat.radius}} | asdict(found)
    if own_run(folder):
        report = read_report(folder) | {"audit": result}
        console.print(f"wrote {RunFolder(folder).write_json('report.json', report)}")
    return result


def read_report(folder: Path) -> dict[str, Any]:
    """What the run's report.json holds already; empty without one."""
    file = folder / "report.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def open_classifier(run: str, device: str) -> tuple[Path, Classifier, dict[str, Any]]:
    """(folder, model, configuration) of a classifier's run; `UserError` for another one."""
    folder, model, config = open_model(run, device)
    if not isinstance(model, Classifier):
        raise UserError(f"{folder} is a run of {config['task']}, not of a classifier")
    return folder, model, config


def threat_of(config: dict[str, Any], radius: float | None) -> Threat:
    """The threat that a run was trained against, with another radius where one is given."""
    training = config.get("training", {})
    chosen = radius if radius is not None else float(training.get("radius", 1.0))
    with user_input():
        return Threat(training.get("norm", "l2"), chosen)


def labelled(config: dict[str, Any], split: Literal["train", "test"], data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """Images and labels of the data that a run belongs to."""
    with user_input():
        return (
            load_images(config["data"], split, root=text(data_dir)),
            load_labels(config["data"], split, root=text(data_dir)),
        )
