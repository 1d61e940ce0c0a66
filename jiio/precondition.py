"""Input steps: how far x moves for a gradient g = dL/dx.

A rule holds a preconditioner P and a rate; x <- project(x - rate P g). P may not fight the constraint: projecting after
a preconditioned step finds the wrong point unless both commute, so that is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from jiio import tree
from jiio.constraint import Box, Constraint, Free
from jiio.schedule import Constant, Falling, Schedule
from jiio.tree import Tree, wide


class Rule(Protocol):
    """What the joint map needs of an input step."""

    @property
    def rate(self) -> float | Tensor:
        """A number, or one for each sample, (batch,)."""
        ...

    def direction(self, gradient: Tensor) -> Tensor:
        """P g, of the shape of x."""
        ...

    def check(self, constraint: Constraint) -> None:
        """`ValueError` when P does not commute with `constraint`."""
        ...

    def select(self, rows: Tensor) -> Rule:
        """The rule of the samples `rows`."""
        ...

    def refresh(self, z: Tree, x: Tensor, k: int) -> Rule:
        """The rule for step `k` at z and x: itself, unless its P follows the iterate."""
        ...


class _Fixed:
    """A rule whose P stays the same through a solve."""

    def refresh(self, z: Tree, x: Tensor, k: int) -> Self:
        """Itself."""
        return self


def _rows(value: float | Tensor, rows: Tensor) -> float | Tensor:
    return value[rows] if isinstance(value, Tensor) and value.dim() else value


def _require_rate(rate: float | Tensor) -> None:
    if not bool(torch.as_tensor(rate > 0).all()):
        raise ValueError(f"the rate of an input step must be positive, got {rate}")


@dataclass(frozen=True)
class Scalar(_Fixed):
    """P = `scale` (a number, or one a sample, shape (batch,)): plain gradient steps.

    With `scale` = 1 / curvature the relative residual of x is in the units of x.
    """

    rate: float | Tensor
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        _require_rate(self.rate)

    def direction(self, gradient: Tensor) -> Tensor:
        """scale * g."""
        return wide(self.scale, gradient) * gradient

    def check(self, constraint: Constraint) -> None:
        """Commutes with every constraint."""

    def select(self, rows: Tensor) -> Scalar:
        """Rows of per-sample rates and scales."""
        return Scalar(_rows(self.rate, rows), _rows(self.scale, rows))


@dataclass(frozen=True)
class Normalized(_Fixed):
    """P g = g / |g|_2 of each sample: a step of length `rate`.

    At a constant rate it has no interior fixed point: give it a schedule or an active constraint.
    """

    rate: float | Tensor

    def __post_init__(self) -> None:
        _require_rate(self.rate)

    def direction(self, gradient: Tensor) -> Tensor:
        """g / |g|, 0 where g vanishes."""
        size = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return gradient / wide(size.clamp_min(torch.finfo(size.dtype).tiny), gradient)

    def check(self, constraint: Constraint) -> None:
        """Commutes with every constraint."""

    def select(self, rows: Tensor) -> Normalized:
        """Rows of a per-sample rate."""
        return Normalized(_rows(self.rate, rows))


@dataclass(frozen=True)
class Sign(_Fixed):
    """P g = sign(g): the steepest step in the maximum norm, for `LinfBall` and `Box`. Needs a schedule, as `Normalized`."""

    rate: float | Tensor

    def __post_init__(self) -> None:
        _require_rate(self.rate)

    def direction(self, gradient: Tensor) -> Tensor:
        """sign(g)."""
        return gradient.sign()

    def check(self, constraint: Constraint) -> None:
        """Coordinate-wise, as far as the sets it is made for are."""

    def select(self, rows: Tensor) -> Sign:
        """Rows of a per-sample rate."""
        return Sign(_rows(self.rate, rows))


@dataclass(frozen=True)
class Diagonal(_Fixed):
    """P = diag(`inverse`), positive, of shape (batch, ...) as x or (1, ...): inverse curvatures of the coordinates."""

    inverse: Tensor = field(repr=False)
    rate: float | Tensor = 0.5

    def __post_init__(self) -> None:
        _require_rate(self.rate)
        if not bool((self.inverse > 0).all()):
            raise ValueError(f"a diagonal preconditioner must be positive; its least entry is {self.inverse.min()}")

    def direction(self, gradient: Tensor) -> Tensor:
        """inverse * g."""
        return self.inverse * gradient

    def check(self, constraint: Constraint) -> None:
        """Commutes with `Free` and `Box`."""
        _require(constraint, (Free, Box), "a diagonal preconditioner")

    def select(self, rows: Tensor) -> Diagonal:
        """Rows of a per-sample diagonal and rate."""
        inverse = self.inverse[rows] if len(self.inverse) > 1 else self.inverse
        return Diagonal(inverse, _rows(self.rate, rows))


@dataclass(frozen=True)
class Matrix(_Fixed):
    """P = `inverse`, a symmetric positive (d, d) for all samples or (batch, d, d), for x of shape (batch, d).

    Made by `jiio.gauss_newton`: the inverse of a Gauss-Newton matrix, so P g is about the distance to the minimum and a
    rate of 1 is a Newton step; the joint solve needs less because z and mu lag behind x.
    """

    inverse: Tensor = field(repr=False)
    rate: float | Tensor = 0.3

    def __post_init__(self) -> None:
        _require_rate(self.rate)
        shape = tuple(self.inverse.shape)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            raise ValueError(f"a matrix preconditioner has shape (d, d) or (batch, d, d), got {shape}")

    def direction(self, gradient: Tensor) -> Tensor:
        """inverse @ g."""
        if gradient.dim() != 2 or gradient.shape[1] != self.inverse.shape[-1]:
            shapes = f"{tuple(self.inverse.shape)} and x of {tuple(gradient.shape)}"
            raise ValueError(f"a matrix preconditioner needs x of shape (batch, d); got a matrix of {shapes}")
        if self.inverse.dim() == 2:
            return gradient @ self.inverse
        return tree.times(self.inverse, gradient)

    def check(self, constraint: Constraint) -> None:
        """Commutes with `Free` only."""
        _require(constraint, (Free,), "a matrix preconditioner")

    def select(self, rows: Tensor) -> Matrix:
        """Rows of per-sample matrices and rates."""
        inverse = self.inverse[rows] if self.inverse.dim() == 3 else self.inverse
        return Matrix(inverse, _rows(self.rate, rows))


def _require(constraint: Constraint, allowed: tuple[type, ...], name: str) -> None:
    if not isinstance(constraint, allowed):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise ValueError(
            f"{name} does not commute with the projection onto {type(constraint).__name__}: steps would stop at the "
            f"wrong point. Use it with {names}, or a Scalar step here."
        )


LEAST_MULTIPLIER = 1e-3


@dataclass(frozen=True)
class Step:
    """Rates of the joint iteration.

    x: an input rule, or a number for `Scalar(rate)`.  z, mu: damping of the equilibrium and adjoint rows, in (0, 1].
    schedule: multiplier of the input rate by step number.
    lag: each sample's input rate is multiplied by min(1, lag / (larger relative residual of its z and mu)), so that x
    waits while z and mu fall behind; `None` leaves the rate alone. A schedule gives the lag of every step: far from the
    minimum a large one is quick, near it a small one keeps slow oscillations down.
    cut: a sample whose gradient turned against its last steps (it overshot) has its rate multiplied by `cut`; the rate
    recovers by 2 % a step, never above the rule's own. `None` leaves it alone, as do solvers that mix iterates.
    lookahead: the direction is extrapolated by this many of its last changes, which makes up for the lag of z and mu where
    a constraint holds x (attacks: 1 saves a third of the steps); without one it turns into oscillation near the minimum,
    so there let a schedule take it away.
    tangent: dz*/dx, a tree of the form of z, each leaf (batch or 1, numbers in x, ...): where x moves by dx, z moves on by
    dz*/dx dx at once, in place of following in the course of 1 / (1 - contraction) steps. A mean over some samples of a model
    will do, and `jiio.newton_step` measures one: contractions near 1, many latents and bad conditions then take about as
    many steps as easy problems do (docs/scaling.md).
    """

    x: float | Rule
    z: float = 1.0
    mu: float = 1.0
    schedule: Schedule = Constant()
    lag: float | Schedule | None = Falling()
    cut: float | None = 0.7
    lookahead: float | Schedule = 0.0
    tangent: Tree | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("z", "mu"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"the damping of {name} must lie in (0, 1], got {getattr(self, name)}")
        if isinstance(self.lag, float | int) and not self.lag > 0:
            raise ValueError(f"lag must be positive or None, got {self.lag}")
        if self.cut is not None and not 0 < self.cut < 1:
            raise ValueError(f"cut must lie in (0, 1) or be None, got {self.cut}")
        if isinstance(self.lookahead, float | int) and self.lookahead < 0:
            raise ValueError(f"lookahead must not be negative, got {self.lookahead}")
        if isinstance(self.x, float | int):
            _require_rate(self.x)

    @property
    def rule(self) -> Rule:
        """The input rule."""
        return Scalar(float(self.x)) if isinstance(self.x, float | int) else self.x

    def check(self, constraint: Constraint, z: Tree, x: Tensor) -> None:
        """`ValueError` where the rule does not commute with `constraint` or the tangent does not fit z and x."""
        self.rule.check(constraint)
        if self.tangent is None:
            return
        for part, leaf in zip(tree.leaves(self.tangent), tree.leaves(z), strict=True):
            shape = x[0].numel(), *leaf.shape[1:]
            if part.shape[1:] != shape or len(part) not in (1, len(x)) or part.dtype != leaf.dtype:
                raise ValueError(
                    f"the tangent of a leaf of z {tuple(leaf.shape)} with respect to x {tuple(x.shape)} has shape "
                    f"(batch or 1, {', '.join(map(str, shape))}) and its dtype; got {tuple(part.shape)}, {part.dtype}"
                )

    def carry(self, z: Tree, move: Tensor) -> Tree:
        """z as it is at its equilibrium to first order when x has moved by `move`; without a tangent `z`."""
        if self.tangent is None:
            return z
        return tree.apply(lambda leaf, part: leaf + tree.combine(part, move.flatten(1)), z, self.tangent)

    def rate(self, k: int, lag: Tensor) -> Tensor:
        """Input rate of each sample at step `k`, shape (batch,), given the larger residual of z and mu."""
        # a schedule that reaches 0 would make the relative residual of x, which is divided by the rate, vanish too
        rate = self.rule.rate * max(self.schedule(k), LEAST_MULTIPLIER)
        if self.lag is None:
            return rate * torch.ones_like(lag)
        return rate * (_at(self.lag, k) / lag).clamp_max(1.0)

    def ahead(self, k: int) -> float:
        """How far the direction of step `k` is extrapolated."""
        return _at(self.lookahead, k)

    def select(self, rows: Tensor) -> Step:
        """The step of the samples `rows`."""
        rule = self.x if isinstance(self.x, float | int) else self.x.select(rows)
        tangent = self.tangent
        if tangent is not None and tree.batch_size(tangent) > 1:
            tangent = tree.select(tangent, rows)
        return replace(self, x=rule, tangent=tangent)


def _at(value: float | Schedule, k: int) -> float:
    return value if isinstance(value, float | int) else value(k)
