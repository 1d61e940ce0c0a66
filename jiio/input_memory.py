"""What a joint solve remembers of its input steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from jiio import tree
from jiio.precondition import Rule
from jiio.tree import Tree, wide

LONGEST_DELAY = 0.9  # beyond it the way gone since would reach over a whole solve


@dataclass
class InputMemory:
    """The state of the input steps, of every sample.

    rule: as it is now.  factor: what overshooting has left of each sample's rate.  direction: each sample's recent one, a
    short moving average: the last one alone misses the slow oscillations of a lagging z and mu. Of averages 0, 0.5, 0.8,
    0.9 and recoveries of 2 and 5 % these were best on small random problems.  last: the direction before extrapolation.
    lag: the larger of the residuals of z and mu when the solve last looked at them.
    seen: the inputs that z and mu have seen, (batch, 2, ...).  delay: their contraction, the share of what they have not seen
    yet that a step leaves unseen.
    slope: dcost/dz at the start, until the first step has measured the delay by it.
    """

    RECOVERY: ClassVar[float] = 1.02
    AVERAGE: ClassVar[float] = 0.5

    rule: Rule
    factor: Tensor
    direction: Tensor
    last: Tensor | None = None
    lag: Tensor | None = None
    seen: Tensor | None = None
    delay: Tensor | None = None
    slope: Tree | None = None

    @classmethod
    def fresh(cls, rule: Rule, x: Tensor, *, slope: Tree | None = None) -> InputMemory:
        """Before the first step from inputs of the form of `x`; without a slope no delay is measured."""
        one = torch.ones_like(x.flatten(1)[:, 0])
        delay = torch.zeros_like(one) if slope is None else None
        return cls(rule, one, torch.zeros_like(x), delay=delay, slope=slope)

    def look(self, probe: Tensor, direction: Tensor, cut: float) -> Tensor:
        """The share of this step to take: `cut` where `probe` points against the recent direction, else 1."""
        turned = (probe * self.direction).flatten(1).sum(1) < 0
        share = torch.where(turned, cut, 1.0).to(direction.dtype)
        self.factor = torch.where(turned, cut * self.factor, (self.RECOVERY * self.factor).clamp_max(1.0))
        self.direction = torch.lerp(direction, self.direction, self.AVERAGE)
        return share

    def ahead(self, direction: Tensor, lookahead: float) -> Tensor:
        """`direction` moved on by `lookahead` times its change since the last step."""
        last, self.last = self.last, direction
        return direction if last is None else direction + lookahead * (direction - last)

    def measure_delay(self, mu: Tree, next_mu: Tree) -> None:
        """By how much J_z^T shortens `mu`, <J_z^T mu, mu> / <mu, mu> in [0, LONGEST_DELAY], given J_z^T mu + dcost/dz."""
        if self.slope is None:
            return
        size, pulled = tree.inner(mu, mu), tree.apply(torch.sub, next_mu, self.slope)
        share = tree.inner(pulled, mu) / size.clamp_min(torch.finfo(size.dtype).tiny)
        self.delay, self.slope = share.nan_to_num(0.0).clamp(0.0, LONGEST_DELAY), None

    def unseen(self, x: Tensor, damping: tuple[float, float]) -> Tensor:
        """`x` less the input that mu has seen; then z and mu, damped by `damping`, see more."""
        assert self.delay is not None, "the first step measures the delay"
        z, mu = (x, x) if self.seen is None else self.seen.unbind(1)
        of_x, of_z = (wide(rate * (1 - self.delay), x) for rate in damping)
        self.seen = torch.stack((torch.lerp(z, x, of_x), torch.lerp(mu, z, of_z)), dim=1)
        return x - mu

    def copy(self) -> InputMemory:
        """The memory for one more measurement, of an equilibrium that has seen x, without a say in the solve's own."""
        return replace(self, seen=None)

    def select(self, rows: Tensor) -> InputMemory:
        """The memory of the samples `rows`."""
        last, lag, seen, delay = (
            None if part is None else part[rows] for part in (self.last, self.lag, self.seen, self.delay)
        )
        return InputMemory(self.rule.select(rows), self.factor[rows], self.direction[rows], last, lag, seen, delay)
