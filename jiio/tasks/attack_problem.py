"""An adversarial attack as a `Problem`.

    maximise over x in ball and box:   loss(h(z), label)     subject to   z = f(z, x)

(JIIO paper, adversarial experiment, without the pixel box there.) The cost is minus the loss, so minus the Lagrangian at
the solution is a training loss whose gradient is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jiio.problem import Problem
from jiio.tasks.labels import check_labels
from jiio.tasks.threat import Threat

Loss = Literal["cross_entropy", "margin"]


class ImageModel(Protocol):
    """What an attack needs of a model; `jiio.models.Classifier` is one.

    f and the readout treat each sample by itself and the same at every call: give a model with dropout or batch norm in
    `eval()`, or its solves do not converge, or depend on the batch.
    """

    def cell(self) -> Callable[[Any, Tensor], Any]:
        """f(z, x) with weights bound once."""
        ...

    def readout(self) -> Callable[[Any], Tensor]:
        """z -> logits with weights bound once."""
        ...

    def start(self, x: Tensor) -> Any:
        """A first z for the images x."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the images x, with the exact gradient."""
        ...


def check_loss(loss: str) -> None:
    """`ValueError` for an unknown loss."""
    if loss not in ("cross_entropy", "margin"):
        raise ValueError(f"loss must be 'cross_entropy' or 'margin', got {loss!r}")


def attack_problem(
    model: ImageModel, images: Tensor, labels: Tensor, threat: Threat, *, loss: Loss = "cross_entropy",
    target: Tensor | None = None,
) -> Problem:  # fmt: skip
    """Maximise the loss of `labels` (batch,) over the threat's set around `images`; with `target` minimise that of the
    targets instead.

    Binds the model's weights: with graph where gradients are enabled, without under `no_grad`. `ValueError` for labels or
    targets that are no classes of the model's, one an image, for images outside the pixel box, and for an unknown loss.
    """
    check_loss(loss)
    if bool(((images < threat.low) | (images > threat.high)).any()):
        raise ValueError(
            f"images must lie in [{threat.low}, {threat.high}], but reach from {images.min():.3g} to {images.max():.3g}"
        )
    f, readout = model.cell(), model.readout()
    with torch.no_grad():  # any z will do to count the logits
        classes = readout(model.start(images[:1])).shape[1]
    labels = check_labels("labels", labels, images, classes)
    if target is not None:
        target = check_labels("targets", target, images, classes)
    sign = -1.0 if target is None else 1.0
    measure = _cross_entropy if loss == "cross_entropy" else margin

    def cell(z: Any, x: Tensor, *classes: Tensor) -> Any:
        return f(z, x)

    def cost(z: Any, x: Tensor, label: Tensor) -> Tensor:
        return sign * measure(readout(z), label)

    return Problem(cell, cost, threat.constraint(images), context=(labels if target is None else target,))


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, reduction="none")


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """The best other logit less the label's, (batch,)."""
    return _others(logits, label).amax(1) - _of(logits, label)


def rivals(logits: Tensor, labels: Tensor, count: int) -> Iterator[Tensor]:
    """The `count` likeliest classes of each image but its own, (batch,) each, the likeliest first."""
    order = _others(logits, labels).argsort(1, descending=True)
    yield from order[:, : min(count, logits.shape[1] - 1)].unbind(1)


def against(problem: Problem, readout: Callable[[Any], Tensor], rival: Tensor) -> Problem:
    """The attack's problem with the margin of the classes `rival` alone as its loss."""

    def cost(z: Any, x: Tensor, label: Tensor, rival: Tensor) -> Tensor:
        logits = readout(z)
        return _of(logits, label) - _of(logits, rival)

    return replace(problem, cost=cost, context=(*problem.context, rival))


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    """The logit of one class of each sample, (batch,)."""
    return logits.gather(1, classes[:, None])[:, 0]


def _others(logits: Tensor, label: Tensor) -> Tensor:
    """The logits, the label's out of the running."""
    return logits.scatter(1, label[:, None], -torch.inf)
