"""A classifier: image -> equilibrium -> logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jiio.deq import DEQ
from jiio.models import layout
from jiio.models.activation import Activation, Name
from jiio.models.cell import Cell, WellPosedCell
from jiio.models.config import ScaledConfig
from jiio.models.image_injection import ImageInjection
from jiio.models.injection import Maps, Shape
from jiio.models.mdeq import MDEQ
from jiio.solution import OnFailure, Solution


@dataclass(frozen=True)
class ClassifierConfig(ScaledConfig):
    """All that rebuilds a `Classifier` but its weights. `to_dict` and `from_dict` go through JSON.

    image_shape: (channels, height, width).  channels: of the cell's scales, finest first; the finest has sides / patch,
    each further one half of that.  contraction, limit: bounds on the cell in z and on each convolution of its injection.
    """

    image_shape: Shape = (1, 28, 28)
    classes: int = 10
    channels: tuple[int, ...] = (16, 32)
    patch: int = 2
    cell: Literal["well_posed", "mdeq"] = "well_posed"
    contraction: float = 0.7
    limit: float = 6.0
    activation: Name = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes, got {self.classes}")


class Classifier(nn.Module):
    """x (batch, channels, height, width) in [0, 1] -> z* = f(z*, x) -> logits (batch, classes).

    The readout is linear on all scales, pooled to the coarsest. `forward` solves z and has the exact gradient in x and in
    the parameters, in `eval()` too: attack libraries take the model as it is. For a joint attack bind the parts once:
    `f = model.cell()`, `readout = model.readout()`.

    tol: relative residual of z, and of the adjoint, in `forward`.
    """

    def __init__(self, config: ClassifierConfig, equilibrium: WellPosedCell | MDEQ):
        super().__init__()
        self.config, self.equilibrium, self.tol = config, equilibrium, 1e-4
        self.on_failure: OnFailure = "warn"
        _, height, width = config.shapes[-1]
        self.head = nn.Linear(sum(config.channels) * height * width, config.classes)
        with torch.no_grad():
            self.head.weight.mul_(0.3)

    def cell(self) -> Cell:
        """f(z, x) with weights bound once, with graph where gradients are enabled."""
        return self.equilibrium.cell()

    def readout(self) -> Callable[[Maps], Tensor]:
        """z -> logits with weights bound once, with graph where gradients are enabled."""
        return layout.pooled(self.head, self.config.shapes)

    def start(self, x: Tensor) -> Maps:
        """z = 0 for the images x."""
        return layout.zeros(x, self.config.shapes)

    def solve(self, x: Tensor, z0: Maps | None = None, *, tol: float | None = None) -> Solution[Maps]:
        """z*(x) with its status, from 0 or a guess."""
        return self._deq(tol).solve(x, self.start(x) if z0 is None else z0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return self.readout()(self._deq(None)(x, self.start(x)))

    def _deq(self, tol: float | None) -> DEQ:
        tol = self.tol if tol is None else tol
        return DEQ(self.cell(), tol=tol, gradient_tol=tol, on_failure=self.on_failure)


def classifier(config: ClassifierConfig) -> Classifier:
    """A `Classifier` with fresh weights from torch's global random state.

    >>> model = classifier(ClassifierConfig(image_shape=(1, 8, 8), patch=1, channels=(8, 16)))
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    activation = Activation(config.activation)
    injection = ImageInjection(
        config.image_shape, config.shapes, patch=config.patch, limit=config.limit, activation=activation
    )
    return Classifier(config, config.build_cell(injection))
