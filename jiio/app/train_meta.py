"""`jiio train meta`: a classifier that adapts to a few labelled examples, trained over tasks drawn from characters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jiio.app.run_folder import user_input
from jiio.app.team import Team
from jiio.app.training import Trainable
from jiio.data import load_characters
from jiio.data.episodes import Episodes
from jiio.data.omniglot import Division
from jiio.models import ContextClassifier, ContextConfig, context_classifier
from jiio.optimizer import Adam
from jiio.tasks.meta import PRIOR, Episode, Gradient, MetaLoss, measured_curvature
from jiio.tasks.unrolled import UnrolledLoss

Adaptation = Literal["joint", "nested", "unrolled", "none"]


@dataclass(frozen=True)
class Training:
    """Options of a training that decide its result; saved in the run's config.json.

    ways, shots: of the tasks that the model is for.  train_ways: classes of a training task, more than `ways` to learn
    more from as many images.  queries: unlabelled images of each class.  tasks: a step.
    adaptation: joint, or a baseline: nested (implicit MAML, with the exact gradient), unrolled (MAML), none (a prototypical
    network).  adaptation_steps: of the joint or nested one.
    """

    ways: int = 5
    shots: int = 1
    train_ways: int = 20
    queries: int = 2
    tasks: int = 2
    gradient: Gradient = "exact"
    adaptation: Adaptation = "joint"
    adaptation_steps: int = 12
    prior: float = PRIOR
    division: Division = "random"
    steps: int = 1500
    learning_rate: float = 1e-3
    warm_up: int = 50
    clip: float = 5.0
    refresh_every: int = 20
    seed: int = 0

    @property
    def batch(self) -> int:
        """Samples a step: a task is one."""
        return self.tasks


class Trainer(Trainable[ContextClassifier, Training]):
    """The state of a training: `step` optimiser steps done."""

    def __init__(self, characters: Tensor, config: ContextConfig, training: Training, *, team: Team = Team()):
        with user_input():
            Episodes(characters, training.ways, training.shots, training.queries)  # of the size that the model is for
            self.episodes = Episodes(
                characters, training.train_ways, training.shots, training.queries, turned=True, seed=training.seed
            )
        torch.manual_seed(training.seed)
        super().__init__(context_classifier(config), training, team)
        self.loss = self._loss()

    def _loss(self) -> MetaLoss | UnrolledLoss:
        training = self.training
        if training.adaptation == "unrolled":
            return UnrolledLoss(self.model, prior=training.prior)
        return MetaLoss(
            self.model,
            gradient=training.gradient,
            prior=training.prior,
            steps=0 if training.adaptation == "none" else training.adaptation_steps,
            optimizer=Adam(0.1) if training.adaptation == "nested" else None,
        )

    def episode(self) -> Episode:
        """The tasks of this step."""
        support, labels, query, answers = self.episodes.draw(self.step, self.training.tasks)
        return Episode(
            support.to(self.device), labels.to(self.device), query.to(self.device), answers.to(self.device),
            self.training.train_ways,
        )  # fmt: skip

    def advance(self) -> dict[str, float]:
        """One optimiser step."""
        training, episode = self.training, self.episode()
        if self.step % training.refresh_every == 0 and training.adaptation != "none":
            self.refresh(episode)
        found, norm = self.descend(lambda places: self.part(episode, places), batch=training.tasks)
        residual = found.pop("residual").median(0).values
        return {
            "step": self.step,
            "residual_z": float(residual[0]),
            "residual_mu": float(residual[1]),
            "residual_x": float(residual[2]),
            "curvature": float(self.model.curvature),
            "gradient_norm": float(norm),
        } | {name: float(values.mean()) for name, values in found.items()}

    def part(self, episode: Episode, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some of the tasks, and what was found of each of them."""
        tasks = chosen(episode, places)
        loss, logits, solution = self.loss(tasks)
        return loss, {
            "accuracy": (logits.argmax(2) == tasks.query_labels).float().mean(1),
            "support": solution.cost,
            "residual": solution.residual,
            "converged": solution.converged.float(),
            "vector": solution.value.x.norm(dim=1),
        }

    def refresh(self, episode: Episode) -> None:
        """Measure the curvature that the adaptation's steps go by: the largest of late is kept, slowly forgotten."""
        parts = [chosen(episode, places) for places in self.team.parts(self.training.tasks)]
        curvatures = [
            measured_curvature(self.model, tasks.support, tasks.support_labels, tasks.ways, prior=self.training.prior)
            for tasks in parts
        ]
        found = self.team.gather(torch.stack(curvatures)).amax()
        self.model.curvature.copy_(torch.maximum(found, FORGET * self.model.curvature) if self.step else found)

    def finish(self) -> None:
        """Measure the curvature on tasks of the size that the model is for."""
        training = self.training
        episodes = Episodes(self.episodes.images, training.ways, training.shots, training.queries, seed=training.seed)
        support, labels, _, _ = (part.to(self.device) for part in episodes.draw(0, FINISH_TASKS))
        self.model.curvature.copy_(measured_curvature(self.model, support, labels, training.ways, prior=training.prior))


def chosen(episode: Episode, places: Tensor) -> Episode:
    """Some of the tasks."""
    support, labels, query, answers, ways = episode
    return Episode(support[places], labels[places], query[places], answers[places], ways)


FORGET = 0.8
FINISH_TASKS = 32


def default_config(shape: tuple[int, int, int], *, cell: str = "well_posed") -> ContextConfig:
    """A classifier for drawings of `shape`: small ones get a cell of half their resolution and half the width."""
    kind = "mdeq" if cell == "mdeq" else "well_posed"
    if min(shape[1:]) >= 16:
        return ContextConfig(image_shape=shape, cell=kind)
    return ContextConfig(
        image_shape=shape, margin=0, channels=(16, 32), patch=2, width=32, film=8, features=32, cell=kind
    )


def make_trainer(
    data: str, training: Training, *, data_dir: str | None = None, cell: str = "well_posed", team: Team = Team()
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a command's options, and the configuration that rebuilds it."""
    with user_input():
        characters = load_characters(data, "train", root=data_dir, division=training.division)
    config = default_config((characters.shape[2], characters.shape[3], characters.shape[4]), cell=cell)
    saved = {"task": "meta", "data": data, "model": config.to_dict(), "training": asdict(training)}
    return Trainer(characters, config, training, team=team), saved


def default_folder(data: str, ways: int, shots: int, seed: int) -> Path:
    """runs/meta-DATA-WAYSwaySHOTSshot-SEED."""
    return Path("runs") / f"meta-{data}-{ways}way{shots}shot-{seed}"
