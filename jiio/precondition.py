"""Input rules: which way x moves for a gradient g = dL/dx.

A rule holds a preconditioner P and a rate; x <- project(x - rate P g). P may not fight the constraint: projecting after
a preconditioned step finds the wrong point unless both commute, so that is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from jiio import tree
from jiio.constraint import Box, Constraint, Free
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


def require_rate(rate: float | Tensor) -> None:
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
        require_rate(self.rate)

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
        require_rate(self.rate)

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
        require_rate(self.rate)

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
        require_rate(self.rate)
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
        require_rate(self.rate)
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
