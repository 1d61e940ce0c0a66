"""An input step whose length follows how far its linear model holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from jiio import tree
from jiio.constraint import Constraint, Free
from jiio.precondition import require_commuting
from jiio.tree import Tree


@dataclass(frozen=True)
class Damped:
    """P = V diag(1 / (values + share damping)) V^T for a free x of d numbers: (H + d G)^-1 where V^T H V = diag(values) and
    V^T G V = 1.

    Each sample's share, 1 at first, falls while z and mu keep up with x and rises while they fall behind (the method of
    Levenberg and Marquardt, its ratio of reductions replaced by the residuals that a joint solve measures anyway). A damping
    that stayed would slow the last steps down, and call x settled where a whole step would still move it far: 16 problems with
    100 latents and 200 measurements all converged so, at eight times the best known cost.

    vectors: V, (batch or 1, d, d).  values, damping: (batch or 1, d) and (batch or 1, 1).  share: (batch or 1, 1).
    """

    # At half of this lag the share falls by 5 % a step at most, at three times as much it rises by a quarter. Falling half as
    # fast leaves costs higher, twice as fast leaves flat problems unconverged (docs/experiments.md).
    TRUSTED: ClassVar[float] = 0.06
    POWER: ClassVar[float] = 0.24
    SLOWEST: ClassVar[float] = 0.947
    FASTEST: ClassVar[float] = 1.26
    MOST: ClassVar[float] = 2.0

    vectors: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    damping: Tensor = field(repr=False)
    share: Tensor = field(repr=False)
    rate: float | Tensor = 1.0

    def direction(self, gradient: Tensor) -> Tensor:
        """P g."""
        along = tree.times(self.vectors.mT, gradient.flatten(1).to(self.vectors.dtype))
        found = tree.times(self.vectors, along / (self.values + self.share * self.damping))
        return found.to(gradient.dtype).view_as(gradient)

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with `Free` only."""
        require_commuting(constraint, (Free,), "a damped step")
        if x[0].numel() != self.vectors.shape[1] or len(self.vectors) not in (1, len(x)):
            raise ValueError(
                f"a damped step has vectors (batch or 1, d, d) for x of d numbers; got {tuple(self.vectors.shape)} and x of "
                f"{tuple(x.shape)}"
            )

    def refresh(self, z: Tree, x: Tensor, k: int, lag: Tensor) -> Damped:
        """The shares after a step that left z and mu behind by `lag`."""
        change = (lag / self.TRUSTED).pow(self.POWER).clamp(self.SLOWEST, self.FASTEST)
        share = (self.share * change.to(self.share.dtype)[:, None]).clamp_max(self.MOST)
        return replace(self, share=share)

    def select(self, rows: Tensor) -> Damped:
        """Rows of what is per sample."""
        names = ("vectors", "values", "damping", "share", "rate")
        return replace(self, **{name: tree.rows_of(getattr(self, name), rows) for name in names})
