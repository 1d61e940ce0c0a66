"""Input rules: which way x moves for a gradient g = dL/dx.

A rule holds a preconditioner P and a rate; x <- project(x - rate P g). P may not fight the constraint: projecting after
a preconditioned step finds the wrong point unless both commute, so that is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol, Self

import torch
from torch import Tensor

from jiio import tree
from jiio.constraint import Box, Constraint, Free, LinfBall
from jiio.intersection import Intersection
from jiio.tree import Tree, wide

BOXES = (Free, Box, LinfBall)  # sets whose projection takes each coordinate on its own
# Of the largest entry: an inverse taken in float32 is off by this at a condition of 1e4; more is a wrong matrix.
ASYMMETRY = 1e-3


class Rule(Protocol):
    """What the joint map needs of an input step."""

    @property
    def rate(self) -> float | Tensor:
        """A number, or one for each sample, (batch,) or (1,)."""
        ...

    def direction(self, gradient: Tensor) -> Tensor:
        """P g, of the shape of x."""
        ...

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """`ValueError` when P does not commute with `constraint`, or does not fit `x`."""
        ...

    def select(self, rows: Tensor) -> Rule:
        """The rule of the samples `rows`."""
        ...

    def refresh(self, z: Tree, x: Tensor, k: int, lag: Tensor) -> Rule:
        """The rule for step `k` at z and x: itself, unless its P follows the iterate. lag: (batch,), the larger relative
        residual of z and mu at the solve's last look."""
        ...


class Fixed:
    """A rule whose P stays the same through a solve."""

    def refresh(self, z: Tree, x: Tensor, k: int, lag: Tensor) -> Self:
        """Itself."""
        return self


def require_rate(rate: float | Tensor) -> None:
    """`ValueError` unless `rate` is a positive number or a tensor of such."""
    if not isinstance(rate, Real | Tensor):
        raise ValueError(f"the rate of an input step is a number or a tensor with one a sample, got {rate!r}")
    if not bool((rate > 0).all() if isinstance(rate, Tensor) else rate > 0):
        raise ValueError(f"the rate of an input step must be positive, got {rate}")


def require_per_sample(name: str, value: float | Tensor, x: Tensor) -> None:
    """`ValueError` unless `value` is a number, or a tensor with one for all samples or for each of x."""
    if not isinstance(value, Tensor) or not value.dim():
        return
    if value.dim() > 1 or len(value) not in (1, len(x)):
        raise ValueError(
            f"{name} is a number, or one a sample, shape ({len(x)},) for x of {tuple(x.shape)}; got {tuple(value.shape)}"
        )
    _require_kind(name, value, x)


def _require_kind(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype or value.device != x.device:
        raise ValueError(
            f"{name} needs the dtype and the device of x, {x.dtype} on {x.device}; it has {value.dtype} on {value.device}"
        )


def require_commuting(constraint: Constraint, allowed: tuple[type, ...], name: str) -> None:
    """`ValueError` unless `constraint`, or each part of an intersection, is of the `allowed` kinds."""
    parts = constraint.constraints if isinstance(constraint, Intersection) else (constraint,)
    for part in parts:
        if not isinstance(part, allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(
                f"{name} does not commute with the projection onto {type(part).__name__}: steps would stop at the wrong "
                f"point. Use it with {names}, or a Scalar or Normalized step here."
            )


@dataclass(frozen=True)
class Scalar(Fixed):
    """P = `scale` (a positive number, or one a sample, shape (batch,)): plain gradient steps.

    With `scale` = 1 / curvature the relative residual of x is in the units of x.
    """

    rate: float | Tensor
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        require_rate(self.rate)
        # measured scales may be 0, of an infinite curvature, or NaN: those samples end as not finite
        wrong = self.scale < 0 if isinstance(self.scale, Tensor) else not self.scale > 0
        if bool(torch.as_tensor(wrong).any()):
            raise ValueError(f"the scale of an input step must be positive, got {self.scale}")

    def direction(self, gradient: Tensor) -> Tensor:
        """scale * g."""
        return wide(self.scale, gradient) * gradient

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with every constraint."""
        require_per_sample("the scale of an input step", self.scale, x)

    def select(self, rows: Tensor) -> Scalar:
        """Rows of per-sample rates and scales."""
        return Scalar(tree.rows_of(self.rate, rows), tree.rows_of(self.scale, rows))


@dataclass(frozen=True)
class Normalized(Fixed):
    """P g = g / |g|_2 of each sample: a step of length `rate`.

    At a constant rate it has no interior fixed point: give it a schedule or an active constraint.
    """

    rate: float | Tensor

    def __post_init__(self) -> None:
        require_rate(self.rate)

    def direction(self, gradient: Tensor) -> Tensor:
        """g / |g|, 0 where g vanishes."""
        tiny = torch.finfo(gradient.dtype).tiny
        # of numbers up to 1: the squares of others may leave the range of floats, and a step be called 0 for it
        unit = gradient / wide(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
        size = torch.linalg.vector_norm(unit.flatten(1), dim=1)
        return unit / wide(size.clamp_min(tiny), gradient)

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with every constraint."""

    def select(self, rows: Tensor) -> Normalized:
        """Rows of a per-sample rate."""
        return Normalized(tree.rows_of(self.rate, rows))


@dataclass(frozen=True)
class Sign(Fixed):
    """P g = sign(g): the steepest step in the maximum norm, for `LinfBall`, `Box` and their intersections. Needs a schedule,
    as `Normalized`."""

    rate: float | Tensor

    def __post_init__(self) -> None:
        require_rate(self.rate)

    def direction(self, gradient: Tensor) -> Tensor:
        """sign(g)."""
        return gradient.sign()

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with boxes and maximum-norm balls, alone or intersected."""
        require_commuting(constraint, BOXES, "a sign step")

    def select(self, rows: Tensor) -> Sign:
        """Rows of a per-sample rate."""
        return Sign(tree.rows_of(self.rate, rows))


@dataclass(frozen=True)
class Diagonal(Fixed):
    """P = diag(`inverse`), positive, of shape (batch, ...) as x or (1, ...): inverse curvatures of the coordinates."""

    inverse: Tensor = field(repr=False)
    rate: float | Tensor = 0.5

    def __post_init__(self) -> None:
        require_rate(self.rate)
        if not self.inverse.dim():
            raise ValueError(
                "a diagonal preconditioner has shape (batch or 1, ...) as x, got a number: use Scalar(rate)"
            )
        if not bool((self.inverse > 0).all()):
            raise ValueError(f"a diagonal preconditioner must be positive; its least entry is {self.inverse.min()}")

    def direction(self, gradient: Tensor) -> Tensor:
        """inverse * g."""
        return self.inverse * gradient

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with boxes and maximum-norm balls, alone or intersected."""
        require_commuting(constraint, BOXES, "a diagonal preconditioner")
        if self.inverse.shape[1:] != x.shape[1:] or len(self.inverse) not in (1, len(x)):
            raise ValueError(
                f"a diagonal preconditioner has the shape of x, {tuple(x.shape)}, or 1 in place of the batch; "
                f"got {tuple(self.inverse.shape)}"
            )
        _require_kind("a diagonal preconditioner", self.inverse, x)

    def select(self, rows: Tensor) -> Diagonal:
        """Rows of a per-sample diagonal and rate."""
        return Diagonal(tree.rows_of(self.inverse, rows), tree.rows_of(self.rate, rows))


@dataclass(frozen=True)
class Matrix(Fixed):
    """P = `inverse`, symmetric and positive, (d, d) or (1, d, d) for all samples or (batch, d, d), for x of d numbers.

    Made by `inverse_of(gauss_newton(...))`: the inverse of a Gauss-Newton matrix, so P g is about the distance to the
    minimum and a rate of 1 is a Newton step; a joint solve needs less where the step knows no tangent, because z and mu lag
    behind x.
    """

    inverse: Tensor = field(repr=False)
    rate: float | Tensor = 0.3

    def __post_init__(self) -> None:
        require_rate(self.rate)
        shape = tuple(self.inverse.shape)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            raise ValueError(f"a matrix preconditioner has shape (d, d) or (batch, d, d), got {shape}")
        _require_symmetric_positive(self.inverse)

    def direction(self, gradient: Tensor) -> Tensor:
        """inverse @ g."""
        self._require_fit(gradient)
        flat = gradient.flatten(1)
        found = flat @ self.inverse if self.inverse.dim() == 2 else tree.times(self.inverse, flat)
        return found.view_as(gradient)

    def check(self, constraint: Constraint, x: Tensor) -> None:
        """Commutes with `Free` only."""
        require_commuting(constraint, (Free,), "a matrix preconditioner")
        self._require_fit(x)
        _require_kind("a matrix preconditioner", self.inverse, x)

    def select(self, rows: Tensor) -> Matrix:
        """Rows of per-sample matrices and rates."""
        inverse = self.inverse[rows] if self.inverse.dim() == 3 and len(self.inverse) > 1 else self.inverse
        return Matrix(inverse, tree.rows_of(self.rate, rows))

    def _require_fit(self, x: Tensor) -> None:
        shape = tuple(self.inverse.shape)
        if x[0].numel() != shape[-1]:
            shapes = f"{shape} and x of {tuple(x.shape)}"
            raise ValueError(f"a matrix preconditioner is (d, d) for x of d numbers; got a matrix of {shapes}")
        if len(shape) == 3 and shape[0] not in (1, len(x)):
            raise ValueError(
                f"a matrix preconditioner needs a matrix for each of {len(x)} samples, or one; got {shape}"
            )


def _require_symmetric_positive(matrix: Tensor) -> None:
    """`ValueError` for what is no P on sight; a sample's matrix that is not finite passes, it shows in its residual."""
    size = matrix.abs().amax((-2, -1))
    skew = (matrix - matrix.mT).abs().amax((-2, -1)) / size
    least = matrix.diagonal(dim1=-2, dim2=-1).amin(-1)
    wrong = size.isfinite() & ((skew > ASYMMETRY) | (least <= 0))
    if not bool(wrong.any()):  # looked at once: on a GPU each look waits
        return
    if bool((least[wrong] <= 0).any()):
        raise ValueError(
            f"a matrix preconditioner must be positive; its diagonal goes down to {least[wrong].min():.3g}"
        )
    raise ValueError(
        f"a matrix preconditioner must be symmetric; entries differ from those across the diagonal by up to "
        f"{skew[wrong].max():.2g} of the largest. Give (P + P.mT) / 2 if that is what you mean."
    )
