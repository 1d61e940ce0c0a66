"""What every training shares: order of the samples, learning rate, the loop with its log, checkpoints and interrupts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jiio.app.interrupt import interrupt_waits
from jiio.app.run_folder import RunFolder, UserError


class Trainable(Protocol):
    """The state of a training that `run_training` carries on: `step` optimiser steps are done."""

    step: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model, whose weights are a checkpoint's first half."""
        ...

    def advance(self) -> dict[str, float]:
        """One optimiser step; the figures that tell whether training is healthy."""
        ...

    def finish(self) -> None:
        """What the weights still need after the last step."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        ...


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


def learning_rate(step: int, *, steps: int, warm_up: int) -> float:
    """Share of the full rate: linear warm-up, then a cosine to 2 %."""
    warm = min(1.0, (step + 1) / warm_up)
    share = min(step / steps, 1.0)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, *, rate: float, clip: float) -> Tensor:
    """One optimiser step at `rate` on the gradient of `loss`, its norm clipped to `clip`; the norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


def run_training(
    folder: RunFolder, trainer: Trainable, *, checkpoint_every: int = 200, log_every: int = 10
) -> Iterator[dict[str, float]]:
    """Train to the end, yielding the figures of every step; checkpoints on the way and when interrupted.

    An interrupt waits for the end of the step, so that what is saved is the state after a whole number of steps.
    """

    def save() -> None:
        folder.save_checkpoint(trainer.step, trainer.model, trainer.state())

    began = time.perf_counter()
    with interrupt_waits() as interrupted:
        while trainer.step < trainer.steps:
            figures = trainer.advance() | {"seconds": time.perf_counter() - began}
            if not math.isfinite(figures["loss"]):
                raise UserError(
                    f"the loss is {figures['loss']} after {trainer.step} steps: lower --learning-rate; {folder.path} keeps "
                    "the last checkpoint"
                )
            if trainer.step % log_every == 0 or trainer.step == 1:
                folder.log(figures)
            if trainer.step % checkpoint_every == 0:
                save()
            try:
                yield figures
            except GeneratorExit:
                save()
                raise
            if interrupted():
                save()
                raise KeyboardInterrupt(
                    f"interrupted after {trainer.step} steps: the same command with --resume goes on"
                )
    trainer.finish()
    save()
    folder.save_weights(trainer.model)


def open_run(
    folder: RunFolder, trainer: Trainable, config: dict[str, Any], *, resume: bool, overwrite: bool
) -> list[str]:
    """Make the run's folder, or take up its last checkpoint; what was wrong with checkpoints that had to be skipped."""
    folder.create(config, existing="resume" if resume else "replace" if overwrite else "refuse")
    if not resume:
        return []
    state, problems = folder.load_checkpoint(trainer.model)
    if state is not None:
        trainer.restore(state)
    folder.rewind_log(trainer.step)
    return problems
