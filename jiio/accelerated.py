"""A solver for minimisations: momentum while x moves slowly, mixing once it comes to rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from jiio import tree
from jiio.solver import Anderson
from jiio.tree import Tree


class _AcceleratedMemory(NamedTuple):
    history: Tree  # of `mixing`
    shrinking: Tensor  # (batch,), moving average of the part that a step leaves of the one before it
    since: Tensor  # (batch,), steps since momentum began anew


@dataclass(frozen=True)
class Accelerated:
    """Momentum while the steps of a sample's x shrink slowly, Anderson mixing once they shrink fast.

    Mixing seeks any stationary point: a sample that moves slowly, past a saddle or down a flat valley, it brings to rest
    on the way. 100 MNIST images enlarged fourfold ended so at three times the cost, 19 of them STALLED. Momentum goes on
    downhill. Steps of which each is half of the last lead to a minimum, and mixing ends what z and mu still lack.

    mixing: with a history of at least 2.  fast: the part of the last step, in [0, 1), up to which a step has shrunk fast.
    momentum: in [0, 1); the iterate goes on from F(s_k) by since / (since + 3), at most `momentum`, times the part that
    steps leave of the last ones, of the way from F(s_k-1) to F(s_k). It starts anew where that way points against
    the step (O'Donoghue and Candes 2015). Steps are those of the last leaf of s, which is x in a joint state.
    """

    mixing: Anderson = Anderson(4, growth=2.0)
    fast: float = 0.5
    momentum: float = 0.9

    plain_steps = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.mixing, Anderson) or self.mixing.history < 2:
            raise ValueError(f"mixing is an Anderson with a history of at least 2, got {self.mixing!r}")
        for name in ("fast", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def init(self, s: Tree) -> Tree:
        """None before the first value of F."""
        return ()

    def step(self, memory: Tree, k: int, s: Tree, fs: Tree) -> tuple[Tree, Tree]:
        """Remember F(s), and go on from it or mix, each sample on its own."""
        history, used = self.mixing.remember(memory.history if k else (), k, s, fs)
        if used == 1:
            one = torch.ones_like(tree.leaves(fs)[-1].flatten(1)[:, 0])
            return fs, _AcceleratedMemory(history, one, torch.zeros_like(one))
        now, before = k % self.mixing.history, (k - 1) % self.mixing.history
        values, steps = (tree.leaves(ring)[-1] for ring in (history.values, history.residuals))
        shrinking = torch.lerp(memory.shrinking, tree.along(steps[:, now], steps[:, before]).clamp(0, 1), 0.5)
        uphill = tree.along(steps[:, now], values[:, now] - values[:, before]) < 0
        since = torch.where(uphill, 0.0, memory.since + 1)
        onward = (since / (since + 3)).clamp_max(self.momentum) * shrinking
        going_on = onward.new_zeros(len(onward), used)
        going_on[:, now], going_on[:, before] = 1 + onward, -onward
        weights = torch.where((shrinking < self.fast)[:, None], self.mixing.weights(history, used), going_on)
        proposal = tree.apply(lambda ring: tree.combine(ring, weights), history.values)
        return proposal, _AcceleratedMemory(history, shrinking, since)
