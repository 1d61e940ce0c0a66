"""Numbers that change with the step of a solve: multipliers of the input rate, allowed lags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """Multiplier 1 at every step."""

    def __call__(self, k: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Multiplier falling linearly from 1 to `end` over `steps` steps, `end` after."""

    steps: int
    end: float = 0.0

    def __call__(self, k: int) -> float:
        """The multiplier of step `k`.

        >>> [Linear(4)(k) for k in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        """
        return 1.0 + (self.end - 1.0) * min(k / self.steps, 1.0)


@dataclass(frozen=True)
class Switch:
    """Multiplier 1 before step `at`, `factor` from then on (the published recipe's schedule)."""

    at: int
    factor: float

    def __call__(self, k: int) -> float:
        """The multiplier of step `k`."""
        return self.factor if k >= self.at else 1.0


@dataclass(frozen=True)
class Falling:
    """`start` at first, falling geometrically by `factor` a step towards `end`.

    >>> [round(Falling()(k), 3) for k in (0, 10, 100)]
    [0.3, 0.137, 0.05]
    """

    start: float = 0.3
    end: float = 0.05
    factor: float = 0.9

    def __call__(self, k: int) -> float:
        """The value of step `k`."""
        return self.end + (self.start - self.end) * self.factor**k
