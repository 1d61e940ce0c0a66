"""What a joint solve remembers of its input steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jiio import tree
from jiio.precondition import Rule

LEAST_SHRINKING = 1e-3  # less can't be told from rounding in float32


@dataclass
class InputMemory:
    """The state of the input steps, of every sample.

    rule: as it is now.  factor: what overshooting has left of each sample's rate.  direction: each sample's recent one, a
    short moving average: the last one alone misses the slow oscillations of a lagging z and mu. Of averages 0, 0.5, 0.8,
    0.9 and recoveries of 2 and 5 % these were best on small random problems.  last: the direction before extrapolation.
    lag: the larger of the residuals of z and mu when the solve last looked at them.  slope: (batch,), |dcost/dz| at the start,
    below which mu does not shrink its relative residual; `None` until the first look.  change: x less where the last step led.
    """

    RECOVERY: ClassVar[float] = 1.02
    AVERAGE: ClassVar[float] = 0.5

    rule: Rule
    factor: Tensor
    direction: Tensor
    last: Tensor | None = None
    lag: Tensor | None = None
    slope: Tensor | None = None
    change: Tensor | None = None

    @classmethod
    def fresh(cls, rule: Rule, x: Tensor) -> InputMemory:
        """Before the first step from inputs of the form of `x`."""
        return cls(rule, torch.ones_like(x.flatten(1)[:, 0]), torch.zeros_like(x))

    def look(self, probe: Tensor, direction: Tensor, cut: float) -> Tensor:
        """The share of this step to take: `cut` where `probe` points against the recent direction, else 1."""
        turned = (probe * self.direction).flatten(1).sum(1) < 0
        gain = torch.full_like(self.factor, self.RECOVERY).masked_fill_(turned, cut)
        self.factor = (gain * self.factor).clamp_max_(1.0)
        self.direction = torch.lerp(direction, self.direction, self.AVERAGE)
        return gain.clamp_max(1.0)

    def ahead(self, direction: Tensor, lookahead: float | Tensor) -> Tensor:
        """`direction` moved on by `lookahead` times its change since the last step."""
        last, self.last = self.last, direction
        return direction if last is None else direction + lookahead * (direction - last)

    def select(self, rows: Tensor) -> InputMemory:
        """The memory of the samples `rows`."""
        rest = (None if part is None else part[rows] for part in (self.last, self.lag, self.slope, self.change))
        return InputMemory(self.rule.select(rows), self.factor[rows], self.direction[rows], *rest)


def steps_left(change: Tensor, last: Tensor | None) -> Tensor:
    """How many steps as long as `change` x would still go, (batch,), if further ones shrink as this one has to the `last`.

    A P that was measured where the curvature was larger makes steps that are short long before the minimum is near.
    """
    if last is None:
        return torch.ones_like(change.flatten(1)[:, 0])
    return 1 / (1 - tree.along(change, last)).clamp(LEAST_SHRINKING, 1.0)
