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
    seen: the inputs that z and mu have seen.  sees: the shares of what they have not seen yet that they see in a step, 1 less
    their contraction, (batch,) each.
    slope: dcost/dz at the start, until the first step has measured the contraction by it.
    """

    RECOVERY: ClassVar[float] = 1.02
    AVERAGE: ClassVar[float] = 0.5

    rule: Rule
    factor: Tensor
    direction: Tensor
    last: Tensor | None = None
    lag: Tensor | None = None
    seen: tuple[Tensor, Tensor] | None = None
    sees: tuple[Tensor, Tensor] | None = None
    slope: Tree | None = None

    @classmethod
    def fresh(cls, rule: Rule, x: Tensor, *, slope: Tree | None = None) -> InputMemory:
        """Before the first step from inputs of the form of `x`; without a slope z and mu are taken to see all of x at once."""
        one = torch.ones_like(x.flatten(1)[:, 0])
        return cls(rule, one, torch.zeros_like(x), sees=(one, one) if slope is None else None, slope=slope)

    def look(self, probe: Tensor, direction: Tensor, cut: float) -> Tensor:
        """The share of this step to take: `cut` where `probe` points against the recent direction, else 1."""
        turned = (probe * self.direction).flatten(1).sum(1) < 0
        gain = torch.full_like(self.factor, self.RECOVERY).masked_fill_(turned, cut)
        self.factor = (gain * self.factor).clamp_max_(1.0)
        self.direction = torch.lerp(direction, self.direction, self.AVERAGE)
        return gain.clamp_max(1.0)

    def ahead(self, direction: Tensor, lookahead: float) -> Tensor:
        """`direction` moved on by `lookahead` times its change since the last step."""
        last, self.last = self.last, direction
        return direction if last is None else direction + lookahead * (direction - last)

    def measure_delay(self, mu: Tree, next_mu: Tree, damping: tuple[float, float]) -> None:
        """By how much J_z^T shortens `mu`, <J_z^T mu, mu> / <mu, mu> in [0, LONGEST_DELAY], given J_z^T mu + dcost/dz; of z and
        mu, damped by `damping`."""
        if self.slope is None:
            return
        size, pulled = tree.inner(mu, mu), tree.apply(torch.sub, next_mu, self.slope)
        share = tree.inner(pulled, mu) / size.clamp_min(torch.finfo(size.dtype).tiny)
        prompt = 1 - share.nan_to_num(0.0).clamp(0.0, LONGEST_DELAY)
        self.sees, self.slope = (damping[0] * prompt, damping[1] * prompt), None

    def unseen(self, x: Tensor) -> Tensor:
        """`x` less the input that mu has seen; then z and mu see more."""
        assert self.sees is not None, "the first step measures the delay"
        z, mu = self.seen or (x, x)
        of_x, of_z = (wide(share, x) for share in self.sees)
        self.seen = torch.lerp(z, x, of_x), torch.lerp(mu, z, of_z)
        return x - mu

    def copy(self) -> InputMemory:
        """The memory for one more measurement, of an equilibrium that has seen x, without a say in the solve's own."""
        return replace(self, seen=None)

    def select(self, rows: Tensor) -> InputMemory:
        """The memory of the samples `rows`."""
        last, lag, seen, sees = (
            None if part is None else tree.select(part, rows) for part in (self.last, self.lag, self.seen, self.sees)
        )
        return InputMemory(self.rule.select(rows), self.factor[rows], self.direction[rows], last, lag, seen, sees)
