"""An input step that knows the largest curvatures of a large x."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from jiio import tree
from jiio.constraint import Constraint, Free
from jiio.precondition import Fixed, require_commuting, require_rate


@dataclass(frozen=True)
class LowRank(Fixed):
    """P = V diag(1 / values) V^T + (1 - V V^T) / rest: inverse curvatures along k directions of an x of d numbers, and one for
    all others.

    vectors: V, orthonormal columns, (batch or 1, d, k).  values: positive, (batch or 1, k).  rest: positive, (batch or 1, 1).
    """

    vectors: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    rest: Tensor = field(repr=False)
    rate: float | Tensor = 1.0

    def __post_init__(self) -> None:
        require_rate(self.rate)

    def direction(self, gradient: Tensor) -> Tensor:
        """P g."""
        flat = gradient.flatten(1)
        along = tree.times(self.vectors.mT, flat)
        others = flat / self.rest
        return (others + tree.times(self.vectors, along / self.values - along / self.rest)).view_as(gradient)

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with `Free` only."""
        require_commuting(constraint, (Free,), "a low-rank preconditioner")
        if x[0].numel() != self.vectors.shape[1] or len(self.vectors) not in (1, len(x)):
            raise ValueError(
                f"a low-rank preconditioner has vectors (batch or 1, d, k) for x of d numbers; got "
                f"{tuple(self.vectors.shape)} and x of {tuple(x.shape)}"
            )

    def select(self, rows: Tensor) -> LowRank:
        """Rows of what is per sample."""
        names = ("vectors", "values", "rest", "rate")
        return replace(self, **{name: tree.rows_of(getattr(self, name), rows) for name in names})
