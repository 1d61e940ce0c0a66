"""Constraint sets of the input: each knows its exact Euclidean projection, per sample and differentiable.

One rule for parameters: a number holds for all samples alike; a radius may also be a (batch,) tensor; any other tensor has
the batch as its first dimension (or 1 in its place, for all samples alike) and then the shape of one sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Self

import torch
from torch import Tensor

from jiio.tree import rows_of, wide

Projection = Callable[[Tensor], Tensor]


class Constraint(ABC):
    """A closed convex set of inputs of one sample."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to each sample of x (batch, ...), in the Euclidean norm."""

    @abstractmethod
    def select(self, rows: Tensor) -> Constraint:
        """The constraint of the samples `rows`."""

    def moved(self, x: Tensor, by: Tensor) -> Tensor:
        """`x` less where a step of -`by` from it ends in the set."""
        return x - self.project(x - by)

    @property
    def scale(self) -> float | Tensor:
        """What distances in x are measured against, a number or (batch,): 1 unless the set is bounded."""
        return 1.0

    def contains(self, x: Tensor, tolerance: float) -> Tensor:
        """Whether each sample is within `tolerance` of the set, (batch,)."""
        return norm(x - self.project(x)) <= tolerance


@dataclass(frozen=True)
class Free(Constraint):
    """No constraint."""

    def project(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def moved(self, x: Tensor, by: Tensor) -> Tensor:
        """`by`."""
        return by

    def select(self, rows: Tensor) -> Free:
        """Itself."""
        return self


@dataclass(frozen=True)
class Box(Constraint):
    """lower <= x <= upper, each a number or a tensor (batch or 1, ...).

    >>> Box(0.0, 1.0).project(torch.tensor([[-1.0, 0.5, 3.0]]))
    tensor([[0.0000, 0.5000, 1.0000]])
    """

    lower: float | Tensor = 0.0
    upper: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if not bool((_cpu(self.lower) <= _cpu(self.upper)).all()):
            raise ValueError(f"a box needs lower <= upper everywhere, got {self.lower} and {self.upper}")

    @property
    def scale(self) -> float | Tensor:
        """Half the width (a sample's widest entry); 1 where that is infinite or 0."""
        if isinstance(self.lower, Real) and isinstance(self.upper, Real):
            width = float(self.upper) - float(self.lower)
            return width / 2 if 0 < width < math.inf else 1.0
        half = (torch.as_tensor(self.upper) - self.lower) / 2
        half = half.flatten(1).amax(1) if half.dim() > 1 else half
        return torch.where(half.isfinite() & (half > 0), half, torch.ones_like(half))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper as tensors that broadcast to x; ValueError where they do not fit it."""
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            require_shape(name, bound, x)
        return like(self.lower, x), like(self.upper, x)

    def project(self, x: Tensor) -> Tensor:
        """x clipped."""
        return clip(x, *self.bounds(x))

    def select(self, rows: Tensor) -> Box:
        """Rows of per-sample bounds."""
        return Box(rows_of(self.lower, rows), rows_of(self.upper, rows))


@dataclass(frozen=True)
class _Ball(Constraint):
    """Points within `radius` of `center` in some norm; center (batch or 1, ...), radius a number or (batch,)."""

    center: Tensor = field(repr=False)
    radius: float | Tensor

    def __post_init__(self) -> None:
        sizes = torch.as_tensor(self.radius)
        if not bool((sizes > 0).all()):
            raise ValueError(f"a ball needs a positive radius, got {self.radius}")
        samples = len(self.center)
        if sizes.dim() > 1 or (sizes.dim() and samples > 1 and len(sizes) not in (1, samples)):
            raise ValueError(
                f"radius of shape {tuple(sizes.shape)} does not fit center of shape {tuple(self.center.shape)}"
            )

    @property
    def scale(self) -> float | Tensor:
        """The radius."""
        return self.radius

    def placed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The centre, which broadcasts to x, and the radius of each sample, (batch,); `ValueError` where they do not fit x."""
        require_shape("center", self.center, x)
        sizes = like(self.radius, x)
        if sizes.dim() and len(sizes) not in (1, len(x)):
            raise ValueError(f"radius of shape {tuple(sizes.shape)} does not fit x of shape {tuple(x.shape)}")
        return like(self.center, x), sizes.expand(len(x))

    def select(self, rows: Tensor) -> Self:
        """Rows of centres and radii."""
        return replace(self, center=rows_of(self.center, rows), radius=rows_of(self.radius, rows))


@dataclass(frozen=True)
class L2Ball(_Ball):
    """|x - center|_2 <= radius; center (batch or 1, ...), radius a number or (batch,).

    >>> L2Ball(torch.zeros(1, 2), 1.0).project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    def project(self, x: Tensor) -> Tensor:
        """x pulled towards the centre to the sphere."""
        center, radius = self.placed(x)
        offset = x - center
        unit = far_unit(norm(offset.detach()))
        offset = offset / wide(unit, x)
        size = norm(offset)
        # the quotient is taken where x is outside only, so that its derivative exists at the centre too
        outside = size > radius / unit
        factor = radius / torch.where(outside, size, torch.ones_like(size))
        return torch.where(wide(outside, x), torch.addcmul(center, wide(factor, x), offset), x)


@dataclass(frozen=True)
class LinfBall(_Ball):
    """|x - center|_inf <= radius; center (batch or 1, ...), radius a number or (batch,).

    >>> LinfBall(torch.zeros(1, 2), 1.0).project(torch.tensor([[3.0, 0.5]]))
    tensor([[1.0000, 0.5000]])
    """

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same set as a box: lower and upper as tensors that broadcast to x."""
        center, radius = self.placed(x)
        return center - wide(radius, x), center + wide(radius, x)

    def project(self, x: Tensor) -> Tensor:
        """x clipped to the cube."""
        return clip(x, *self.bounds(x))


@dataclass(frozen=True)
class Simplex(Constraint):
    """x >= 0 with entries that sum to `total`, over all entries of a sample.

    >>> Simplex().project(torch.tensor([[2.0, 0.0]]))
    tensor([[1., 0.]])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.total < math.inf:
            raise ValueError(f"a simplex needs a positive, finite total, got {self.total}")

    @property
    def scale(self) -> float | Tensor:
        """The total."""
        return self.total

    def project(self, x: Tensor) -> Tensor:
        """max(x - threshold, 0), the threshold by sorting (Held, Wolfe and Crowder 1974)."""
        require_batch(x)
        flat = x.flatten(1)
        ordered = flat.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - self.total
        count = torch.arange(1, flat.shape[1] + 1, dtype=x.dtype, device=x.device)
        positive = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
        threshold = excess.gather(1, positive - 1) / positive
        return (flat - threshold).clamp_min(0).view_as(x)

    def select(self, rows: Tensor) -> Simplex:
        """Itself."""
        return self


def clip(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """x between bounds that broadcast to it."""
    return torch.minimum(torch.maximum(x, lower), upper)


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, (batch,)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))


def far_unit(size: Tensor) -> Tensor:
    """A unit of length for each `size`, a norm or its square: 1, and a large one where squares of finite numbers overflowed.

    >>> far_unit(torch.tensor([1e19, torch.inf])) > 1
    tensor([False,  True])
    """
    return torch.ones_like(size).masked_fill(size.isinf(), torch.finfo(size.dtype).max ** 0.75)


def _cpu(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value).detach().cpu()


def like(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or tensor in the dtype and on the device of `x`."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def require_batch(x: Tensor) -> None:
    """`ValueError` for an x without a batch dimension."""
    if x.dim() < 2:
        raise ValueError(f"x has shape (batch, ...) with at least one dimension beside the batch, got {tuple(x.shape)}")


def require_shape(name: str, value: float | Tensor, x: Tensor) -> None:
    """`ValueError`, with both shapes, for a parameter that does not fit x."""
    require_batch(x)
    if not isinstance(value, Tensor) or not value.dim():
        return
    if value.shape[1:] != x.shape[1:] or len(value) not in (1, len(x)):
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit x of shape {tuple(x.shape)}")
