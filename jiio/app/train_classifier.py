"""`jiio train adversarial`: a classifier trained on the attacked images of every batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jiio.app.run_folder import UserError, user_input
from jiio.app.team import Team
from jiio.app.training import Order, Trainable
from jiio.data import load_images, load_labels
from jiio.models import Classifier, ClassifierConfig, classifier
from jiio.tasks.adversarial import AdversarialLoss
from jiio.tasks.attack import GRADIENT_TOL, JointAttack, Method, PGDAttack
from jiio.tasks.threat import Norm, Threat

Attacker = Literal["joint", "pgd", "none"]


@dataclass(frozen=True)
class Training:
    """Options of a training that decide its result; saved in the run's config.json.

    attack: joint; pgd, the baseline with full solves; none, clean training.  attack_steps, solve_tol, warm: of the attack.
    radius: grows linearly from 0 to this over the first third of the training.  clean: share of the clean loss.
    flip: mirror images at random, and shift them by up to 2 pixels (photographs).
    """

    attack: Attacker = "joint"
    attack_steps: int = 6
    warm: bool = False
    solve_tol: float = 1e-2
    norm: Norm = "l2"
    radius: float = 1.0
    clean: float = 0.0
    steps: int = 1500
    batch: int = 64
    learning_rate: float = 1e-3
    warm_up: int = 50
    clip: float = 20.0
    flip: bool = False
    seed: int = 0


RADII = {"digits": 0.7, "mnist": 1.0, "fashion-mnist": 0.5, "cifar10": 0.5}
RAMP = 1 / 3  # of the training in which the radius grows: at full strength from the start a fresh model learns nothing


def default_config(shape: tuple[int, int, int], classes: int, *, cell: str = "well_posed") -> ClassifierConfig:
    """A classifier for images of `shape`: small images keep their resolution; colour gets three wider scales."""
    small, colour = min(shape[1:]) < 16, shape[0] > 1
    return ClassifierConfig(
        image_shape=shape,
        classes=classes,
        channels=(24, 48, 96) if colour else (16, 32) if small else (24, 48),
        patch=1 if small else 2,
        cell="mdeq" if cell == "mdeq" else "well_posed",
    )


class Trainer(Trainable[Classifier, Training]):
    """The state of a training: `step` optimiser steps done."""

    # MNIST, 3000 steps: 92.4 to 92.7 % robust (three seeds) in place of 91.3 and 91.5 (two; docs/experiments.md)
    decay = 3.0

    def __init__(
        self, images: Tensor, labels: Tensor, config: ClassifierConfig, training: Training, *, team: Team = Team()
    ):
        if len(images) < training.batch:
            raise UserError(f"{len(images)} training images are fewer than a batch of {training.batch}")
        torch.manual_seed(training.seed)
        super().__init__(classifier(config), training, team)
        self.images, self.labels = images, labels
        self.model.on_failure = "ignore"
        self.model.tol = GRADIENT_TOL  # of clean images too: the same loss as at 1e-4 for two thirds of the time
        self.order = Order(len(images), training.batch, training.seed)

    def advance(self) -> dict[str, float]:
        """One optimiser step."""
        radius, rows = self.radius, self.order.rows(self.step)
        found, norm = self.descend(lambda places: self.part(rows, places), batch=len(rows))
        figures = {name: float(found[name].mean()) for name in ("loss", "accuracy", "f", "vjp") if name in found}
        if "residual" in found:
            residual = found["residual"].median(0).values.tolist()
            figures |= dict(zip(("residual_z", "residual_mu", "residual_x"), residual, strict=True))
            figures["radius"] = radius
        return {"step": self.step, "gradient_norm": float(norm)} | figures

    @property
    def radius(self) -> float:
        """Of this step's attack."""
        return self.training.radius * min(1.0, (self.step + 1) / (RAMP * self.training.steps))

    def part(self, rows: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the images at some places of the batch `rows`, and what tells whether their solves are healthy."""
        training = self.training
        images, labels = self.images[rows[places]].to(self.device), self.labels[rows[places]].to(self.device)
        if training.flip:
            images = self.augmented(images, places, len(rows))
        if training.attack == "none":
            logits = self.model(images)
            return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float()}
        adversarial = AdversarialLoss(
            self.model, Threat(training.norm, self.radius), method=method(training), clean=training.clean
        )
        loss, solution = adversarial(images, labels)
        with torch.no_grad():
            prediction = self.model.readout()(solution.value.z).argmax(1)
        each = torch.ones(len(images), device=images.device) / len(images)
        return loss, {
            "accuracy": (prediction == labels).float(),
            "residual": solution.residual,
            "f": solution.work.f * each,
            "vjp": solution.work.vjp * each,
        }

    def augmented(self, images: Tensor, places: Tensor, batch: int) -> Tensor:
        """Mirrored and shifted at random, by seed, step and place in the batch alone."""
        generator = torch.Generator().manual_seed(self.training.seed * 100003 + self.step)
        mirrored = (torch.rand(batch, generator=generator) < 0.5)[places].to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
        padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
        return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]].contiguous()


def method(training: Training) -> Method:
    """The attack of a training."""
    if training.attack == "joint":
        return JointAttack(steps=training.attack_steps, solve_tol=training.solve_tol, tol=GRADIENT_TOL)
    return PGDAttack(steps=training.attack_steps, warm=training.warm, solve_tol=training.solve_tol)


def make_trainer(
    data: str, training: Training, *, data_dir: str | None = None, cell: str = "well_posed", team: Team = Team()
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a command's options, and the configuration that rebuilds it."""
    with user_input():
        # labels first: a folder of photographs, which has none, takes long to read
        labels, images = (load(data, "train", root=data_dir) for load in (load_labels, load_images))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = default_config(shape, int(labels.max()) + 1, cell=cell)
    saved = {"task": "classification", "data": data, "model": config.to_dict(), "training": asdict(training)}
    return Trainer(images, labels, config, training, team=team), saved


def default_folder(data: str, seed: int) -> Path:
    """runs/adversarial-DATA-SEED."""
    return Path("runs") / f"adversarial-{data}-{seed}"
