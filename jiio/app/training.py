"""What every training shares: order of the samples, learning rate, the loop with its log, checkpoints and interrupts."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from jiio.app.interrupt import interrupt_waits
from jiio.app.run_folder import RunFolder, UserError
from jiio.app.team import Team
from jiio.app.weight_optimizer import WeightOptimizer

Figures = dict[str, float]


class Options(Protocol):
    """What every training's options have."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        ...

    @property
    def batch(self) -> int:
        """Samples a step."""
        ...

    @property
    def learning_rate(self) -> float:
        """At its highest; matrices take four times as much (`WeightOptimizer`)."""
        ...

    @property
    def warm_up(self) -> int:
        """Steps over which the learning rate grows to it."""
        ...

    @property
    def clip(self) -> float:
        """Largest norm of a gradient."""
        ...


Net = TypeVar("Net", bound=nn.Module)
Opt = TypeVar("Opt", bound=Options)


class Trainable(ABC, Generic[Net, Opt]):
    """The state of a training that `run_training` carries on: `step` optimiser steps are done.

    A training says what one step does, `advance`, by way of `descend`; what it keeps beside weights and optimiser it gives
    to a checkpoint in `state`. `decay` is its `WeightOptimizer`'s.
    """

    decay: ClassVar[float] = 0.0

    def __init__(self, model: Net, training: Opt, team: Team):
        self.model, self.training, self.team, self.device = model.to(team.device), training, team, team.device
        self.optimizer = WeightOptimizer(self.model.parameters(), decay=self.decay)
        self.step = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.training.steps

    @abstractmethod
    def advance(self) -> Figures:
        """One optimiser step; the figures that tell whether training is healthy."""

    def descend(
        self, part: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]], *, batch: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Count a step, and take it, on the mean loss of a batch, with the gradient's norm clipped.

        part(places) gives the mean loss of the samples at some places of the batch, and what was found of each of them,
        (samples, ...); it is called for every part of this process's share. Returned: what was found of the whole batch,
        with its "loss", and the norm before clipping.
        """
        training, parameters = self.training, list(self.model.parameters())
        self.optimizer.zero_grad()
        found: list[dict[str, Tensor]] = []
        parts = self.team.parts(batch)
        for places in parts:
            loss, values = part(places)
            (loss / len(parts)).backward()
            found.append(values | {"loss": loss.detach().expand(len(places))})
        self.team.average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        share = learning_rate(self.step, steps=training.steps, warm_up=training.warm_up)
        self.optimizer.step(training.learning_rate * share)
        self.step += 1
        return {name: self.team.gather(torch.cat([values[name] for values in found])) for name in found[0]}, norm

    def finish(self) -> None:
        """What the weights still need after the last step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimiser."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""

    def checkpoint(self) -> dict[str, Any]:
        """All that a checkpoint holds beside the weights."""
        return self.state() | {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint; `UserError` for one of the time before `WeightOptimizer`."""
        if "averages" not in checkpoint["optimizer"]:
            raise UserError("the checkpoint is of an earlier version, which took other steps: start with --overwrite")
        self.step = checkpoint["step"]
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.restore(checkpoint)


class Order:
    """The rows of each step: every sample once an epoch, in an order that depends on seed and epoch alone."""

    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch, self.seed = count, batch, seed
        self.epoch, self.order = -1, torch.empty(0)

    def rows(self, step: int) -> Tensor:
        """Indices (batch,) of the samples of `step`."""
        epoch, place = divmod(step, self.count // self.batch)
        if self.epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        return self.order[place * self.batch : (place + 1) * self.batch]


def chosen(images: Tensor, count: int, *, batch: int, seed: int, mirror: bool | None = False) -> Tensor:
    """`count` training images chosen by `seed`, all for 0, each also left to right if `mirror` (None: if they have
    colours, as photographs do); `UserError` for fewer than a batch."""
    if count:
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
    found = f"{len(images)} training images"
    # a folder's grey scans, letters among them, are read as three channels alike
    if mirror or (mirror is None and bool((images[:, 1:] != images[:, :1]).any())):
        images = torch.cat((images, images.flip(-1)))
        found += f", {len(images)} with the mirrored ones,"
    if len(images) < batch:
        raise UserError(f"{found} are fewer than a batch of {batch}")
    return images


def learning_rate(step: int, *, steps: int, warm_up: int) -> float:
    """Share of the full rate: linear warm-up, then a cosine to 2 %."""
    warm = min(1.0, (step + 1) / warm_up)
    share = min(step / steps, 1.0)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


class Watch(NamedTuple):
    """What is to be done with the figures every so many steps."""

    every: int
    act: Callable[[Figures], object]


def run_training(
    folder: RunFolder,
    trainer: Trainable[Any, Any],
    *,
    checkpoint_every: int = 200,
    log_every: int = 10,
    watches: Sequence[Watch] = (),
) -> Generator[Figures]:
    """Train to the end, yielding the figures of every step; checkpoints on the way and when interrupted.

    An interrupt waits for the end of the step, so that what is saved is the state after a whole number of steps. The
    leading process alone writes and watches, and fits what the finished weights need.
    """

    def save(figures: Figures) -> None:
        folder.save_checkpoint(trainer.step, trainer.model, trainer.checkpoint())

    watches = [Watch(log_every, folder.log), Watch(checkpoint_every, save), *watches]
    # what was done before a resume counts
    team, began = trainer.team, time.perf_counter() - (folder.seconds() or 0.0)
    with interrupt_waits() as interrupted:
        while trainer.step < trainer.steps:
            try:
                figures = trainer.advance() | {"seconds": time.perf_counter() - began}
            # decompositions raise where other operations return NaN
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                raise _diverged(trainer, folder, "what the training measures is not finite") from error
            if not math.isfinite(figures["loss"]):
                raise _diverged(trainer, folder, f"the loss is {figures['loss']}")
            due = watches[:1] if trainer.step == 1 and log_every > 1 else []
            due += [watch for watch in watches if trainer.step % watch.every == 0]
            if due:
                team.first(lambda due=due, figures=figures: _act(due, figures))
            try:
                yield figures
            except GeneratorExit:
                if team.leads:
                    save(figures)
                raise
            if team.any(interrupted()):
                team.first(lambda figures=figures: save(figures))
                raise KeyboardInterrupt(
                    f"interrupted after {trainer.step} steps: the same command with --resume goes on"
                )
    if team.leads:
        # before the last fit, which takes long, and not after it: a checkpoint is never written over by another one
        save({})
        trainer.finish()
        folder.save_weights(trainer.model)


def _diverged(trainer: Trainable[Any, Any], folder: RunFolder, sign: str) -> UserError:
    return UserError(
        f"{sign} after {trainer.step} steps: lower --learning-rate; {folder.path} keeps the last checkpoint"
    )


def _act(watches: Sequence[Watch], figures: Figures) -> None:
    for watch in watches:
        watch.act(figures)


def open_run(
    folder: RunFolder, trainer: Trainable[Any, Any], config: dict[str, Any], *, resume: bool, overwrite: bool
) -> list[str]:
    """Make the run's folder, or take up its last checkpoint; what was wrong with checkpoints that had to be skipped.

    `UserError`, and no folder, where the team can't split a batch."""
    team = trainer.team
    team.parts(trainer.training.batch)
    existing = "resume" if resume else "replace" if overwrite else "refuse"
    team.first(lambda: folder.create(config, existing=existing))
    if not resume:
        return []
    weights, state, problems = team.first(lambda: _checkpoint(folder, trainer.model))
    trainer.model.load_state_dict(weights)
    if state is not None:
        trainer.resume(state)
    team.first(lambda: folder.rewind_log(trainer.step))
    return problems


def _checkpoint(folder: RunFolder, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None, list[str]]:
    state, problems = folder.load_checkpoint(model)
    return {name: value.cpu() for name, value in model.state_dict().items()}, state, problems
