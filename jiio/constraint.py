"""Constraint sets of the input: each knows its exact Euclidean projection, per sample and differentiable.

Parameters are numbers, or tensors with the batch first (or 1 in its place, for all samples alike).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

# Newton steps on the one-dimensional dual of ball and box; it is piecewise smooth and convex, so a few suffice.
DUAL_STEPS = 60
DYKSTRA_SWEEPS = 500
Number = TypeVar("Number", Tensor, float | Tensor)


class Constraint(ABC):
    """A closed convex set of inputs of one sample."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to each sample of x (batch, ...), in the Euclidean norm."""

    @abstractmethod
    def select(self, rows: Tensor) -> Constraint:
        """The constraint of the samples `rows`."""

    @property
    def scale(self) -> float | Tensor:
        """What distances in x are measured against: 1, or the radius of a ball; (batch,) or a number."""
        return 1.0

    def contains(self, x: Tensor, tolerance: float) -> Tensor:
        """Whether each sample is within `tolerance` of the set, (batch,)."""
        return _norm(x - self.project(x)) <= tolerance


@dataclass(frozen=True)
class Free(Constraint):
    """No constraint."""

    def project(self, x: Tensor) -> Tensor:
        """x."""
        return x

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
        if not bool((torch.as_tensor(self.lower) <= torch.as_tensor(self.upper)).all()):
            raise ValueError(f"a box needs lower <= upper everywhere, got {self.lower} and {self.upper}")

    def project(self, x: Tensor) -> Tensor:
        """x clipped."""
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            _require_shape(name, bound, x)
        return torch.minimum(torch.maximum(x, _like(self.lower, x)), _like(self.upper, x))

    def select(self, rows: Tensor) -> Box:
        """Rows of per-sample bounds."""
        return Box(_rows(self.lower, rows), _rows(self.upper, rows))


def _require_radius(radius: float | Tensor) -> None:
    if not bool((torch.as_tensor(radius) > 0).all()):
        raise ValueError(f"a ball needs a positive radius, got {radius}")


@dataclass(frozen=True)
class L2Ball(Constraint):
    """|x - center|_2 <= radius; center (batch or 1, ...), radius a number or (batch,).

    >>> L2Ball(torch.zeros(1, 2), 1.0).project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    center: Tensor = field(repr=False)
    radius: float | Tensor

    def __post_init__(self) -> None:
        _require_radius(self.radius)

    @property
    def scale(self) -> float | Tensor:
        """The radius."""
        return self.radius

    def project(self, x: Tensor) -> Tensor:
        """x pulled towards the centre to the sphere."""
        _require_shape("center", self.center, x)
        offset = x - self.center
        size = _norm(offset)
        radius = torch.as_tensor(self.radius, dtype=x.dtype, device=x.device)
        # the quotient is taken where x is outside only, so that its derivative exists at the centre too
        outside = size > radius
        factor = torch.where(outside, radius / torch.where(outside, size, torch.ones_like(size)), torch.ones_like(size))
        return torch.where(_wide(outside, x), self.center + _wide(factor, x) * offset, x)

    def select(self, rows: Tensor) -> L2Ball:
        """Rows of centres and radii."""
        return L2Ball(_rows(self.center, rows), _rows(self.radius, rows))


@dataclass(frozen=True)
class LinfBall(Constraint):
    """|x - center|_inf <= radius; center (batch or 1, ...), radius a number or (batch,).

    >>> LinfBall(torch.zeros(1, 2), 1.0).project(torch.tensor([[3.0, 0.5]]))
    tensor([[1.0000, 0.5000]])
    """

    center: Tensor = field(repr=False)
    radius: float | Tensor

    def __post_init__(self) -> None:
        _require_radius(self.radius)

    @property
    def scale(self) -> float | Tensor:
        """The radius."""
        return self.radius

    def box(self) -> Box:
        """The same set as a box."""
        radius = _wide(self.radius, self.center)
        return Box(self.center - radius, self.center + radius)

    def project(self, x: Tensor) -> Tensor:
        """x clipped to the cube."""
        _require_shape("center", self.center, x)
        return self.box().project(x)

    def select(self, rows: Tensor) -> LinfBall:
        """Rows of centres and radii."""
        return LinfBall(_rows(self.center, rows), _rows(self.radius, rows))


@dataclass(frozen=True)
class Simplex(Constraint):
    """x >= 0 with entries that sum to `total`, over all entries of a sample.

    >>> Simplex().project(torch.tensor([[2.0, 0.0]]))
    tensor([[1., 0.]])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not self.total > 0:
            raise ValueError(f"a simplex needs a positive total, got {self.total}")

    @property
    def scale(self) -> float | Tensor:
        """The total."""
        return self.total

    def project(self, x: Tensor) -> Tensor:
        """max(x - threshold, 0), the threshold by sorting (Held, Wolfe and Crowder 1974)."""
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


@dataclass(frozen=True)
class Intersection(Constraint):
    """Points in all of `constraints`; its projection is exact, unlike projecting on one after the other.

    Boxes and maximum-norm balls become one box; with one `L2Ball` beside it the projection is a root of the
    one-dimensional dual, and differentiable. Anything else goes through Dykstra's algorithm (Boyle and Dykstra 1986), up
    to 500 sweeps. `ValueError` where the sets do not meet.
    """

    constraints: tuple[Constraint, ...]

    def __init__(self, *constraints: Constraint):
        if not constraints:
            raise ValueError("an intersection needs at least one constraint")
        object.__setattr__(self, "constraints", constraints)

    @property
    def scale(self) -> float | Tensor:
        """The smallest scale among bounded sets."""
        scales = [torch.as_tensor(part.scale) for part in self.constraints if not isinstance(part, Free | Box)]
        smallest = torch.as_tensor(1.0) if not scales else scales[0]
        for scale in scales[1:]:
            smallest = torch.minimum(smallest, scale)
        return smallest if smallest.dim() else float(smallest)

    def select(self, rows: Tensor) -> Intersection:
        """Rows of each set."""
        return Intersection(*(part.select(rows) for part in self.constraints))

    def contains(self, x: Tensor, tolerance: float) -> Tensor:
        """Whether each sample is within `tolerance` of every set."""
        return torch.stack([part.contains(x, tolerance) for part in self.constraints]).all(0)

    def project(self, x: Tensor) -> Tensor:
        """The nearest common point, to 1e-6 or the float's accuracy."""
        boxes = [part.box() if isinstance(part, LinfBall) else part for part in self.constraints]
        boxes = [part for part in boxes if isinstance(part, Box)]
        balls = [part for part in self.constraints if isinstance(part, L2Ball)]
        others = [p for p in self.constraints if not isinstance(p, Box | LinfBall | L2Ball | Free)]
        if others or len(balls) > 1:
            return _dykstra(self.constraints, x)
        box = _common_box(boxes, x) if boxes else None
        if not balls:
            return box.project(x) if box else x
        return balls[0].project(x) if box is None else _ball_and_box(balls[0], box, x)


def _common_box(boxes: list[Box], x: Tensor) -> Box:
    lower, upper = _like(boxes[0].lower, x), _like(boxes[0].upper, x)
    for box in boxes[1:]:
        lower, upper = torch.maximum(lower, _like(box.lower, x)), torch.minimum(upper, _like(box.upper, x))
    if not bool((lower <= upper).all()):
        raise ValueError("the sets of an intersection do not meet: a lower bound lies above an upper one")
    return Box(lower, upper)


def _ball_and_box(ball: L2Ball, box: Box, x: Tensor) -> Tensor:
    """argmin |p - x| over both: p = clip((x + t c) / (1 + t)) with the multiplier t >= 0 that brings |p - c| to radius.

    With s = 1 / (1 + t) in (0, 1], p(s) = clip(c + s (x - c)) and |p(s) - c| grows with s: bisection, then one Newton
    step that carries the derivative (implicit function theorem).
    """
    _require_shape("center", ball.center, x)
    radius = torch.as_tensor(ball.radius, dtype=x.dtype, device=x.device).expand(len(x))
    center = ball.center
    offset = x - center

    def distance(s: Tensor) -> Tensor:
        return _norm(box.project(center + _wide(s, x) * offset) - center)

    with torch.no_grad():
        nearest = _norm(box.project(center.expand_as(x)) - center)
        if bool((nearest > radius * (1 + 1e-6)).any()):
            raise ValueError(
                "the sets of an intersection do not meet: the box is farther from the centre than the radius"
            )
        low, high = torch.zeros_like(radius), torch.ones_like(radius)
        outside = distance(high) > radius
        for _ in range(DUAL_STEPS):
            middle = (low + high) / 2
            far = distance(middle) > radius
            low, high = torch.where(far, low, middle), torch.where(far, middle, high)
        root = torch.where(outside, low, torch.ones_like(low))
    if not torch.is_grad_enabled() or not (x.requires_grad or center.requires_grad):
        return box.project(center + _wide(root, x) * offset)
    slope = _slope(box, center.detach(), offset.detach(), root)
    s = root - torch.where(outside, (distance(root) - radius) / slope, torch.zeros_like(root))
    return box.project(center + _wide(s, x) * offset)


def _slope(box: Box, center: Tensor, offset: Tensor, root: Tensor) -> Tensor:
    with torch.enable_grad():
        s = root.detach().requires_grad_()
        length = _norm(box.project(center + _wide(s, offset) * offset) - center)
        (slope,) = torch.autograd.grad(length.sum(), s)
    return torch.where(slope > 0, slope, torch.ones_like(slope))


def _dykstra(constraints: tuple[Constraint, ...], x: Tensor) -> Tensor:
    tolerance = 1e-9 if x.dtype == torch.float64 else 1e-7
    corrections = [torch.zeros_like(x) for _ in constraints]
    size = _norm(x.detach()).clamp_min(1.0)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(DYKSTRA_SWEEPS):
        before = x
        for i, part in enumerate(constraints):
            moved = part.project(x + corrections[i])
            corrections[i] = torch.where(_wide(done, x), corrections[i], x + corrections[i] - moved)
            x = torch.where(_wide(done, x), x, moved)
        # a sweep that stands still only with feasible points: Dykstra may pause far from the intersection
        feasible = torch.stack([_norm(part.project(x) - x) <= tolerance * size for part in constraints]).all(0)
        done = done | (feasible & (_norm(x - before) <= tolerance * size))
        if bool(done.all()):
            return x
    gaps = torch.stack([_norm(part.project(x) - x) for part in constraints]).amax(0)
    if bool((gaps > 1e-4 * size).any()):
        raise ValueError(
            f"the sets of an intersection do not seem to meet: after {DYKSTRA_SWEEPS} sweeps a sample is "
            f"{float(gaps.max()):.1e} away from one of them"
        )
    return x


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))


def _wide(value: float | Tensor, like: Tensor) -> Tensor:
    value = torch.as_tensor(value)
    return value.view(-1, *[1] * (like.dim() - 1)) if value.dim() else value


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _rows(value: Number, rows: Tensor) -> Number:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) > 1 else value


def _require_shape(name: str, value: float | Tensor, x: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.dim():
        return
    if value.shape[1:] != x.shape[1:] or len(value) not in (1, len(x)):
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit x of shape {tuple(x.shape)}")
