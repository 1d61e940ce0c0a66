"""The exact projection onto points that lie in several sets at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from jiio.autodiff import variable
from jiio.constraint import (
    Box,
    Constraint,
    Free,
    L2Ball,
    LinfBall,
    Projection,
    Simplex,
    clip,
    far_unit,
    like,
    norm,
    require_batch,
)
from jiio.tree import wide

# 2^-60 is below the rounding of float64 for a multiplier in (0, 1].
DUAL_STEPS = 60
DYKSTRA_SWEEPS = 2000
CHECK_EVERY = 10


@dataclass(frozen=True, init=False)
class Intersection(Constraint):
    """Points in all of the given sets (one by one, or as one tuple); its projection is exact: no clipping after a ball.

    Boxes and maximum-norm balls become one box, with a `Simplex` beside it if there is one; up to two `L2Ball`s are roots
    of their one-dimensional duals: for one ball around a point of the box by Newton's method, a synchronisation with the
    device a step; else by 60 bisections each, nested for two, and none. Derivatives come from the implicit function theorem,
    second ones included. Any other set (a third ball, your own) goes through Dykstra's algorithm (Boyle and Dykstra 1986),
    stopped by its duality gap; its derivative is that of the sweeps, kept in memory.

    ValueError where the sets do not meet (looked for once per object and form of x, and again for changed tensors or ones
    that a derivative is taken of), and where Dykstra's algorithm does not get to 1e-6 (float32: to rounding) in
    2000 sweeps.

    >>> Intersection(L2Ball(torch.zeros(1, 2), 1.0), Box(0.0, 0.6)).project(torch.tensor([[2.0, 1.0]]))
    tensor([[0.6000, 0.6000]])
    """

    constraints: tuple[Constraint, ...]
    _tensors: tuple[Tensor, ...] = field(repr=False, compare=False)
    _prepared: dict[object, tuple[object, Projection]] = field(repr=False, compare=False)

    def __init__(self, *constraints: Constraint | tuple[Constraint, ...]):
        parts = [p for given in constraints for p in (given if isinstance(given, tuple) else (given,))]
        for part in parts:
            if not isinstance(part, Constraint):
                raise ValueError(f"an intersection is of constraints, got {part!r}")
        if not parts:
            raise ValueError("an intersection needs at least one constraint")
        flat = [q for p in parts for q in (p.constraints if isinstance(p, Intersection) else (p,))]
        object.__setattr__(self, "constraints", tuple(flat))
        bounded = [part for part in flat if isinstance(part, Box | LinfBall | L2Ball)]
        tensors = [value for part in bounded for value in vars(part).values() if isinstance(value, Tensor)]
        object.__setattr__(self, "_tensors", tuple(tensors))
        object.__setattr__(self, "_prepared", {})

    def __reduce__(self) -> tuple[type[Intersection], tuple[Constraint, ...]]:
        """A copy prepares projections of its own."""
        return Intersection, self.constraints

    @property
    def scale(self) -> float | Tensor:
        """The smallest scale among balls and simplices; without any, among boxes."""
        sets = [p for p in self.constraints if not isinstance(p, Free)]
        scales = [p.scale for p in sets if not isinstance(p, Box)] or [p.scale for p in sets] or [1.0]
        if not any(isinstance(s, Tensor) and s.dim() for s in scales):
            return min(float(s) for s in scales)
        model = next(s for s in scales if isinstance(s, Tensor) and s.dim())
        return reduce(torch.minimum, [like(s, model) for s in scales])

    def select(self, rows: Tensor) -> Intersection:
        """Rows of each set."""
        return Intersection(*(part.select(rows) for part in self.constraints))

    def contains(self, x: Tensor, tolerance: float) -> Tensor:
        """Whether each sample is within `tolerance` of every set."""
        return torch.stack([part.contains(x, tolerance) for part in self.constraints]).all(0)

    def project(self, x: Tensor) -> Tensor:
        """The nearest common point."""
        require_batch(x)
        graph = torch.is_grad_enabled()
        # a graph through the parameters belongs to one call; changes of an inference tensor can't be seen
        if any(t.is_inference() or (graph and t.requires_grad) for t in self._tensors):
            return self._prepare(x)(x)
        # tensors made in inference mode must not meet autograd
        form = (x.shape, x.dtype, x.device, torch.is_inference_mode_enabled())
        content = [(t.data_ptr(), t._version) for t in self._tensors]  # `.data = ` leaves the version as it is
        known, project = self._prepared.get(form, (None, None))
        if project is None or known != content:
            project = self._prepare(x)
            self._prepared[form] = content, project
        return project(x)

    def _prepare(self, x: Tensor) -> Projection:
        """The projection of points of the form of `x`; ValueError where the sets do not meet."""
        balls = [part for part in self.constraints if isinstance(part, L2Ball)]
        known = all(isinstance(part, Free | Box | LinfBall | L2Ball | Simplex) for part in self.constraints)
        if not known or len(balls) > 2:
            return lambda v: _dykstra(self.constraints, v)
        project, boxed = _polyhedron(self.constraints, x), None
        if len(balls) == 1 and not any(isinstance(part, Simplex) for part in self.constraints):
            lower, upper = _bounds(self.constraints, x)
            center = like(balls[0].center, x)
            if bool(((lower <= center) & (center <= upper)).all()):
                boxed = (lower - center).expand_as(x).flatten(1), (upper - center).expand_as(x).flatten(1)
        for ball in balls:
            project = _inside_ball(ball, project, x, box=boxed)
        return project


def _refuse_empty(bad: Tensor, reason: str) -> None:
    if bool(bad.any()):
        rows = bad.expand(1) if not bad.dim() else bad
        raise ValueError(
            f"the sets of an intersection do not meet for samples {rows.nonzero()[:8, 0].tolist()}: {reason}"
        )


def _bounds(sets: tuple[Constraint, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """The common box of all boxes and cubes among `sets`."""
    boxes = [part.bounds(x) for part in sets if isinstance(part, Box | LinfBall)]
    if not boxes:
        boxes = [(like(-math.inf, x), like(math.inf, x))]
    return reduce(torch.maximum, [low for low, _ in boxes]), reduce(torch.minimum, [high for _, high in boxes])


def _polyhedron(sets: tuple[Constraint, ...], x: Tensor) -> Projection:
    """The projection on all boxes, cubes and simplices among `sets`."""
    totals = {part.total for part in sets if isinstance(part, Simplex)}
    lower, upper = _bounds(sets, x)
    crossed = (lower > upper).expand_as(x).flatten(1).any(1)
    _refuse_empty(crossed, "a lower bound lies above an upper one")
    if not totals:
        return lambda v: clip(v, lower, upper)
    total, low = max(totals), lower.clamp_min(0)
    if len(totals) > 1:
        raise ValueError(f"the sets of an intersection do not meet: simplices of totals {sorted(totals)}")
    slack = 1e-6 * total
    least, most = (bound.expand_as(x).flatten(1).sum(1) for bound in (low, upper))
    crossed = (low > upper).expand_as(x).flatten(1).any(1)
    _refuse_empty(crossed | (least > total + slack) | (most < total - slack), f"no entries in the box sum to {total}")
    return lambda v: _clipped_simplex(v, low, upper, total)


def _clipped_simplex(x: Tensor, lower: Tensor, upper: Tensor, total: float) -> Tensor:
    """clip(x - threshold, lower, upper) with the threshold that makes the entries sum to `total`."""

    def clipped(threshold: Tensor) -> Tensor:
        return clip(x - wide(threshold, x), lower, upper)

    with torch.no_grad():
        low, high = (x - upper.clamp_max(total)).flatten(1).amin(1), (x - lower).flatten(1).amax(1)
        threshold = _bisect(lambda t: clipped(t).flatten(1).sum(1) < total, low, high)
        moved = x - wide(threshold, x)
        free = (moved > lower) & (moved < upper)
    # with the active bounds known the threshold is linear in x: exact, and differentiable
    count = free.flatten(1).sum(1)
    fixed = torch.where(free, torch.zeros_like(x), clipped(threshold)).flatten(1).sum(1)
    exact = (torch.where(free, x, torch.zeros_like(x)).flatten(1).sum(1) + fixed - total) / count.clamp_min(1)
    return clipped(torch.where(count > 0, exact, threshold))


def _inside_ball(ball: L2Ball, project: Projection, x: Tensor, *, box: tuple[Tensor, Tensor] | None) -> Projection:
    """The projection on the ball and on the convex set that `project` projects on.

    It is p(s) = project(c + s (x - c)) where s = 1 / (1 + multiplier) in (0, 1] brings |p(s) - c|, which grows with s, to
    the radius; two Newton steps give s its first and second derivative (implicit function theorem).
    box: the bounds less the centre, flat, where `project` clips to a box that holds the ball's centre.
    """
    center, radius = ball.placed(x)
    with torch.no_grad():
        apart = norm(project(center.expand_as(x)) - center) > radius * (1 + 1e-6)
    _refuse_empty(apart, "the other sets are farther from a ball's centre than its radius")

    def nearest(v: Tensor) -> Tensor:
        offset = v - center

        def excess(s: Tensor) -> Tensor:
            return (project(center + wide(s, v) * offset) - center).flatten(1).square().sum(1) - radius.square()

        inside = project(v)
        with torch.no_grad():
            one = torch.ones_like(radius)
            outside = (inside - center).flatten(1).square().sum(1) > radius.square()
            if box is None:
                s = _bisect(lambda middle: excess(middle) > 0, torch.zeros_like(one), one)
            else:
                s = _root_in_box(offset, *box, radius)
        attached = torch.is_grad_enabled() and any(t.requires_grad for t in (inside, center, radius))
        for _ in range(2 if attached else 0):
            s = s - _newton(excess, s, outside, floor=torch.finfo(v.dtype).eps * radius.square())
        return torch.where(wide(outside, v), project(center + wide(s, v) * offset), inside)

    return nearest


def _root_in_box(offset: Tensor, lower: Tensor, upper: Tensor, radius: Tensor) -> Tensor:
    """s with |clip(s offset, lower, upper)| = radius, for bounds lower <= 0 <= upper.

    The square of that length is a concave, piecewise linear function of s^2, so Newton's method climbs to the root from 0
    in a few steps (1 to 4 for images), exactly, and never beyond it: until no more entries reach their bounds. At most 1,
    which a point inside the ball would exceed. (Selecting entries by a mask took four times as long as clipping does.)
    """
    offset, square = offset.flatten(1), radius.square()
    size, most = offset.square(), torch.ones_like(square)
    total = size.sum(1)
    if not math.isfinite(float(total.sum())):
        most = far_unit(total)
        offset = offset / most[:, None]  # and s is measured in 1 / most, up to most
        size = offset.square()
        total = size.sum(1)
    tiny, end = torch.finfo(size.dtype).tiny, most.square()
    t = torch.minimum(square / total.clamp_min(tiny), end)
    free = torch.ones_like(size, dtype=torch.bool)
    for _ in range(DUAL_STEPS):
        reach = t.sqrt()[:, None] * offset
        clipped = torch.maximum(torch.minimum(reach, upper), lower)
        before, free = free, clipped == reach
        if torch.equal(free, before):
            break
        slope = (size * free).sum(1).clamp_min(tiny)
        rest = square - clipped.square().sum(1)
        t = torch.minimum(torch.maximum(t + rest / slope, t), end)
    return t.sqrt() / most


def _newton(excess: Projection, s: Tensor, where: Tensor, *, floor: Tensor) -> Tensor:
    """excess / its slope where `where` holds and the slope is above `floor`: 0 at the root, its derivatives Newton's."""
    at = s if s.requires_grad else variable(s)
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
    eps, size = torch.finfo(x.dtype).eps, norm(x.detach()).clamp_min(1.0)
    # |x - p*|^2 <= duality gap: 1e-13 brings 3e-7, and the rounding of projections of far points bounds it from below
    enough = (16 * eps * size.square()).clamp_min(1e-13)
    done, apart = ~norm(x.detach()).isfinite(), torch.zeros_like(size)
    for sweep in range(1, DYKSTRA_SWEEPS + 1):
        for i, part in enumerate(constraints):
            moved = torch.where(wide(done, x), points[i], part.project(x + corrections[i]))
            corrections[i] = torch.where(wide(done, x), corrections[i], x + corrections[i] - moved)
            points[i] = moved
            x = torch.where(wide(done, x), x, moved)
        if sweep % CHECK_EVERY == 0:
            with torch.no_grad():
                gaps = torch.stack([norm(point - x) for point in points])
                pull = torch.stack([norm(c) for c in corrections]).amax(0) + norm(start - x)
                apart = gaps.amax(0)
                met = (gaps.sum(0) * pull <= enough) & (apart <= 1e-7 + 16 * eps * size)
                done = done | met | ~norm(x).isfinite()
            if bool(done.all()):
                return x
    gap = float(torch.where(done, torch.zeros_like(size), apart).max())
    raise ValueError(
        f"the sets of an intersection do not meet, or meet too flatly for Dykstra's algorithm: after {DYKSTRA_SWEEPS} "
        f"sweeps samples {(~done).nonzero()[:8, 0].tolist()} are up to {gap:.1e} away from one of them"
    )
