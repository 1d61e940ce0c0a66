"""Constraint sets of the input: each knows its exact Euclidean projection, per sample and differentiable.

One rule for parameters: a number holds for all samples alike; a radius may also be a (batch,) tensor; any other tensor has
the batch as its first dimension (or 1 in its place, for all samples alike) and then the shape of one sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

# 2^-60 is below the rounding of float64 for a multiplier in (0, 1].
DUAL_STEPS = 60
DYKSTRA_SWEEPS = 2000
CHECK_EVERY = 10
Number = TypeVar("Number", Tensor, float | Tensor)
Projection = Callable[[Tensor], Tensor]


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
        """What distances in x are measured against, a number or (batch,): 1 unless the set is bounded."""
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
        if not bool((_cpu(self.lower) <= _cpu(self.upper)).all()):
            raise ValueError(f"a box needs lower <= upper everywhere, got {self.lower} and {self.upper}")

    @property
    def scale(self) -> float | Tensor:
        """Half the width (a sample's widest entry); 1 where that is infinite or 0."""
        half = (torch.as_tensor(self.upper) - self.lower) / 2
        half = half.flatten(1).amax(1) if half.dim() > 1 else half
        half = torch.where(half.isfinite() & (half > 0), half, torch.ones_like(half))
        return half if half.dim() else float(half)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper as tensors that broadcast to x; ValueError where they do not fit it."""
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            _require_shape(name, bound, x)
        return _like(self.lower, x), _like(self.upper, x)

    def project(self, x: Tensor) -> Tensor:
        """x clipped."""
        lower, upper = self.bounds(x)
        return torch.minimum(torch.maximum(x, lower), upper)

    def select(self, rows: Tensor) -> Box:
        """Rows of per-sample bounds."""
        return Box(_rows(self.lower, rows), _rows(self.upper, rows))


def _require_radius(center: Tensor, radius: float | Tensor) -> None:
    sizes = torch.as_tensor(radius)
    if not bool((sizes > 0).all()):
        raise ValueError(f"a ball needs a positive radius, got {radius}")
    if sizes.dim() > 1 or (sizes.dim() and len(center) > 1 and len(sizes) not in (1, len(center))):
        raise ValueError(f"radius of shape {tuple(sizes.shape)} does not fit center of shape {tuple(center.shape)}")


def _radius_of(radius: float | Tensor, x: Tensor) -> Tensor:
    sizes = _like(radius, x)
    if sizes.dim() and len(sizes) not in (1, len(x)):
        raise ValueError(f"radius of shape {tuple(sizes.shape)} does not fit x of shape {tuple(x.shape)}")
    return sizes.expand(len(x))


@dataclass(frozen=True)
class L2Ball(Constraint):
    """|x - center|_2 <= radius; center (batch or 1, ...), radius a number or (batch,).

    >>> L2Ball(torch.zeros(1, 2), 1.0).project(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """

    center: Tensor = field(repr=False)
    radius: float | Tensor

    def __post_init__(self) -> None:
        _require_radius(self.center, self.radius)

    @property
    def scale(self) -> float | Tensor:
        """The radius."""
        return self.radius

    def project(self, x: Tensor) -> Tensor:
        """x pulled towards the centre to the sphere."""
        _require_shape("center", self.center, x)
        center, radius = _like(self.center, x), _radius_of(self.radius, x)
        offset = x - center
        size = _norm(offset)
        # the quotient is taken where x is outside only, so that its derivative exists at the centre too
        outside = size > radius
        factor = radius / torch.where(outside, size, torch.ones_like(size))
        return torch.where(_wide(outside, x), center + _wide(factor, x) * offset, x)

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
        _require_radius(self.center, self.radius)

    @property
    def scale(self) -> float | Tensor:
        """The radius."""
        return self.radius

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same set as a box: lower and upper as tensors that broadcast to x."""
        _require_shape("center", self.center, x)
        center, radius = _like(self.center, x), _wide(_radius_of(self.radius, x), x)
        return center - radius, center + radius

    def project(self, x: Tensor) -> Tensor:
        """x clipped to the cube."""
        lower, upper = self.bounds(x)
        return torch.minimum(torch.maximum(x, lower), upper)

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
        if not 0 < self.total < math.inf:
            raise ValueError(f"a simplex needs a positive, finite total, got {self.total}")

    @property
    def scale(self) -> float | Tensor:
        """The total."""
        return self.total

    def project(self, x: Tensor) -> Tensor:
        """max(x - threshold, 0), the threshold by sorting (Held, Wolfe and Crowder 1974)."""
        _require_batch(x)
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


@dataclass(frozen=True, init=False)
class Intersection(Constraint):
    """Points in all of the given sets (one by one, or as one tuple); its projection is exact: no clipping after a ball.

    Boxes and maximum-norm balls become one box, with a `Simplex` beside it if there is one; up to two `L2Ball`s are roots
    of their one-dimensional duals (60 bisections each, nested for two; no synchronisation inside). Derivatives come from
    the implicit function theorem, second ones included. Any other set (a third ball, your own) goes through Dykstra's
    algorithm (Boyle and Dykstra 1986), stopped by its duality gap; its derivative is that of the sweeps, kept in memory.

    ValueError where the sets do not meet (looked for once per object, shape and dtype), and where Dykstra's algorithm does
    not get to 1e-6 (float32: to rounding) in 5000 sweeps.

    >>> Intersection(L2Ball(torch.zeros(1, 2), 1.0), Box(0.0, 0.6)).project(torch.tensor([[2.0, 1.0]]))
    tensor([[0.6000, 0.6000]])
    """

    constraints: tuple[Constraint, ...]
    _met: set[object] = field(repr=False, compare=False)

    def __init__(self, *constraints: Constraint | tuple[Constraint, ...]):
        parts = [p for given in constraints for p in (given if isinstance(given, tuple) else (given,))]
        for part in parts:
            if not isinstance(part, Constraint):
                raise ValueError(f"an intersection is of constraints, got {part!r}")
        if not parts:
            raise ValueError("an intersection needs at least one constraint")
        flat = [q for p in parts for q in (p.constraints if isinstance(p, Intersection) else (p,))]
        object.__setattr__(self, "constraints", tuple(flat))
        object.__setattr__(self, "_met", set())

    @property
    def scale(self) -> float | Tensor:
        """The smallest scale among balls and simplices; without any, among boxes."""
        sets = [p for p in self.constraints if not isinstance(p, Free)]
        scales = [p.scale for p in sets if not isinstance(p, Box)] or [p.scale for p in sets] or [1.0]
        if not any(isinstance(s, Tensor) and s.dim() for s in scales):
            return min(float(s) for s in scales)
        like = next(s for s in scales if isinstance(s, Tensor) and s.dim())
        return reduce(torch.minimum, [_like(s, like) for s in scales])

    def select(self, rows: Tensor) -> Intersection:
        """Rows of each set."""
        return Intersection(*(part.select(rows) for part in self.constraints))

    def contains(self, x: Tensor, tolerance: float) -> Tensor:
        """Whether each sample is within `tolerance` of every set."""
        return torch.stack([part.contains(x, tolerance) for part in self.constraints]).all(0)

    def project(self, x: Tensor) -> Tensor:
        """The nearest common point."""
        _require_batch(x)
        balls = [part for part in self.constraints if isinstance(part, L2Ball)]
        known = all(isinstance(part, Free | Box | LinfBall | L2Ball | Simplex) for part in self.constraints)
        if not known or len(balls) > 2:
            return _dykstra(self.constraints, x)
        key = (x.shape, x.dtype, x.device)
        project = _polyhedron(self.constraints, x, check=key not in self._met)
        for ball in balls:
            project = _inside_ball(ball, project, x, check=key not in self._met)
        self._met.add(key)
        return project(x)


def _refuse_empty(bad: Tensor, reason: str) -> None:
    if bool(bad.any()):
        rows = bad.expand(1) if not bad.dim() else bad
        raise ValueError(
            f"the sets of an intersection do not meet for samples {rows.nonzero()[:8, 0].tolist()}: {reason}"
        )


def _polyhedron(sets: tuple[Constraint, ...], x: Tensor, *, check: bool) -> Projection:
    """The projection on all boxes, cubes and simplices among `sets`."""
    boxes = [part.bounds(x) for part in sets if isinstance(part, Box | LinfBall)]
    totals = {part.total for part in sets if isinstance(part, Simplex)}
    if not boxes:
        boxes = [(_like(-math.inf, x), _like(math.inf, x))]
    lower = reduce(torch.maximum, [low for low, _ in boxes])
    upper = reduce(torch.minimum, [high for _, high in boxes])
    if check:
        crossed = (lower > upper).expand_as(x).flatten(1).any(1)
        _refuse_empty(crossed, "a lower bound lies above an upper one")
    if not totals:
        return lambda v: torch.minimum(torch.maximum(v, lower), upper)
    total, low = max(totals), lower.clamp_min(0)
    if len(totals) > 1:
        raise ValueError(f"the sets of an intersection do not meet: simplices of totals {sorted(totals)}")
    if check:
        slack = 1e-6 * total
        least, most = (bound.expand_as(x).flatten(1).sum(1) for bound in (low, upper))
        crossed = (low > upper).expand_as(x).flatten(1).any(1)
        _refuse_empty(
            crossed | (least > total + slack) | (most < total - slack), f"no entries in the box sum to {total}"
        )
    return lambda v: _clipped_simplex(v, low, upper, total)


def _clipped_simplex(x: Tensor, lower: Tensor, upper: Tensor, total: float) -> Tensor:
    """clip(x - threshold, lower, upper) with the threshold that makes the entries sum to `total`."""

    def clip(threshold: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x - _wide(threshold, x), lower), upper)

    with torch.no_grad():
        low, high = (x - upper.clamp_max(total)).flatten(1).amin(1), (x - lower).flatten(1).amax(1)
        threshold = _bisect(lambda t: clip(t).flatten(1).sum(1) < total, low, high)
        moved = x - _wide(threshold, x)
        free = (moved > lower) & (moved < upper)
    # with the active bounds known the threshold is linear in x: exact, and differentiable
    count = free.flatten(1).sum(1)
    fixed = torch.where(free, torch.zeros_like(x), clip(threshold)).flatten(1).sum(1)
    exact = (torch.where(free, x, torch.zeros_like(x)).flatten(1).sum(1) + fixed - total) / count.clamp_min(1)
    return clip(torch.where(count > 0, exact, threshold))


def _inside_ball(ball: L2Ball, project: Projection, x: Tensor, *, check: bool) -> Projection:
    """The projection on the ball and on the convex set that `project` projects on.

    It is p(s) = project(c + s (x - c)) where s = 1 / (1 + multiplier) in (0, 1] brings |p(s) - c|, which grows with s, to
    the radius; two Newton steps give s its first and second derivative (implicit function theorem).
    """
    _require_shape("center", ball.center, x)
    center, radius = _like(ball.center, x), _radius_of(ball.radius, x)
    if check:
        with torch.no_grad():
            apart = _norm(project(center.expand_as(x)) - center) > radius * (1 + 1e-6)
        _refuse_empty(apart, "the other sets are farther from a ball's centre than its radius")

    def nearest(v: Tensor) -> Tensor:
        offset = v - center

        def excess(s: Tensor) -> Tensor:
            return (project(center + _wide(s, v) * offset) - center).flatten(1).square().sum(1) - radius.square()

        inside = project(v)
        with torch.no_grad():
            one = torch.ones_like(radius)
            outside = (inside - center).flatten(1).square().sum(1) > radius.square()
            s = _bisect(lambda middle: excess(middle) > 0, torch.zeros_like(one), one)
        attached = torch.is_grad_enabled() and any(t.requires_grad for t in (inside, center, radius))
        for _ in range(2 if attached else 0):
            s = s - _newton(excess, s, outside, floor=torch.finfo(v.dtype).eps * radius.square())
        return torch.where(_wide(outside, v), project(center + _wide(s, v) * offset), inside)

    return nearest


def _newton(excess: Projection, s: Tensor, where: Tensor, *, floor: Tensor) -> Tensor:
    """excess / its slope where `where` holds and the slope is above `floor`: 0 at the root, its derivatives Newton's."""
    at = s if s.requires_grad else s.detach().requires_grad_()
    value = excess(at)
    (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
    regular = where & (slope > floor)
    # the value is left out: rounding divided by a small slope would throw the point off the sphere
    return torch.where(regular, value - value.detach(), torch.zeros_like(s)) / torch.where(
        regular, slope, torch.ones_like(s)
    )


def _bisect(beyond: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The last point of each [low, high] that is not beyond the root; no synchronisation."""
    for _ in range(DUAL_STEPS):
        middle = (low + high) / 2
        far = beyond(middle)
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    return low


def _dykstra(constraints: tuple[Constraint, ...], x: Tensor) -> Tensor:
    start, points = x, [x for _ in constraints]
    corrections = [torch.zeros_like(x) for _ in constraints]
    eps, size = torch.finfo(x.dtype).eps, _norm(x.detach()).clamp_min(1.0)
    # |x - p*|^2 <= duality gap: 1e-13 brings 3e-7, and the rounding of projections of far points bounds it from below
    enough = (16 * eps * size.square()).clamp_min(1e-13)
    done, apart = ~_norm(x.detach()).isfinite(), torch.zeros_like(size)
    for sweep in range(1, DYKSTRA_SWEEPS + 1):
        for i, part in enumerate(constraints):
            moved = torch.where(_wide(done, x), points[i], part.project(x + corrections[i]))
            corrections[i] = torch.where(_wide(done, x), corrections[i], x + corrections[i] - moved)
            points[i] = moved
            x = torch.where(_wide(done, x), x, moved)
        if sweep % CHECK_EVERY == 0:
            with torch.no_grad():
                gaps = torch.stack([_norm(point - x) for point in points])
                pull = torch.stack([_norm(c) for c in corrections]).amax(0) + _norm(start - x)
                apart = gaps.amax(0)
                met = (gaps.sum(0) * pull <= enough) & (apart <= 1e-7 + 16 * eps * size)
                done = done | met | ~_norm(x).isfinite()
            if bool(done.all()):
                return x
    gap = float(torch.where(done, torch.zeros_like(size), apart).max())
    raise ValueError(
        f"the sets of an intersection do not meet, or meet too flatly for Dykstra's algorithm: after {DYKSTRA_SWEEPS} "
        f"sweeps samples {(~done).nonzero()[:8, 0].tolist()} are up to {gap:.1e} away from one of them"
    )


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))


def _cpu(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value).detach().cpu()


def _wide(value: float | Tensor, like: Tensor) -> Tensor:
    value = torch.as_tensor(value)
    return value.view(-1, *[1] * (like.dim() - 1)) if value.dim() else value


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _rows(value: Number, rows: Tensor) -> Number:
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) > 1 else value


def _require_batch(x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"x has shape (batch, ...) with at least one dimension beside the batch, got {tuple(x.shape)}")


def _require_shape(name: str, value: float | Tensor, x: Tensor) -> None:
    _require_batch(x)
    if not isinstance(value, Tensor) or not value.dim():
        return
    if value.shape[1:] != x.shape[1:] or len(value) not in (1, len(x)):
        raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit x of shape {tuple(x.shape)}")
