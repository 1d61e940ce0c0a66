"""What one evaluation of a map is, and the per-sample records of a solve: the best iterate, finished, failed and how."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jiio import tree
from jiio.solution import Solution, Status, TracePoint, Work
from jiio.tree import Tree

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

STALL_STEPS = 50
STALL_GAIN = 1e-3
TREND_WEIGHT = 0.2
DIVERGENCE_FACTOR = 1e3
SETTLED = 1e-2
SETTLING = 0.1  # share by which a defect has to fall to count as progress
FAR = 0.3
GROWING_CHECKS = 3
# Merits are known to about this share, and to their doubt; an earlier iterate is preferred only when it was better by more.
MERIT_ACCURACY = 1e-3
# Their doubt supposes a contraction of two thirds, and is larger the slower z and mu arrive. An iterate that has converged is
# given up only for what was better by so many times the doubt: lagging had flattered earlier ones, and at contractions of
# 0.9 to 0.98 a problem of one latent ended STALLED, up to 4 % further from its minimum.
SLOW_DOUBT = 100.0
# Rows are taken out when at most this share of them goes on: copying the rest costs little beside an evaluation.
COMPACTED = 0.75


class Evaluation(NamedTuple):
    """One evaluation of a map at s.

    next: F(s).  value: s as it is returned.  residual: (batch, blocks), relative, measured at s.  remaining: (batch,), how
    many times as far as the last block's residual says it is from its end, at least 1; convergence is judged with it.
    scale: (batch,), what the first block's residual was divided by.  merit: (batch,), lower is better, infinite where
    iterates can't be compared by it yet, measured at s.  doubt: (batch,), how far the merit may be off.
    """

    next: Tree
    value: Tree
    residual: Tensor
    remaining: Tensor
    scale: Tensor
    merit: Tensor
    doubt: Tensor


class Map(Protocol):
    """What the loop iterates."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the columns of a residual."""
        ...

    @property
    def work(self) -> Work:
        """Where evaluations are counted."""
        ...

    def kept(self, unfinished: int, rows: int) -> int:
        """With how few of its `rows` the map can go on, at least `unfinished`; `rows` where `select` does not work."""
        ...

    def evaluate(self, s: Tree, k: int) -> Evaluation:
        """Evaluate at `s`, the iterate of step `k`, and measure it. The first step of an iteration is always measured."""
        ...

    def advance(self, s: Tree, k: int) -> Tree:
        """The same F(s), not measured."""
        ...

    def project(self, s: Tree) -> Tree:
        """The nearest feasible iterate; solvers that mix iterates leave the set."""
        ...

    def settled(self, s: Tree) -> Tree:
        """`s` with what lags behind brought up to the rest, as it is returned where a solve ends unconverged."""
        ...

    def measure(self, s: Tree) -> Evaluation:
        """An evaluation at `s` that has no say in later ones."""
        ...

    def select(self, rows: Tensor) -> Map:
        """The map of the samples `rows`."""
        ...


class Book:
    """Per-sample records of one solve: `value`, `residual`, `merit`, `status`, `steps` for the whole batch, and for the rows
    still in the iteration the signs of failure. `value` is the best iterate so far of a row in the iteration, and what is
    returned of a finished one: one state serves for both.

    Kept in NumPy: forty operations on a number a sample take a tenth of the time there, and of a GPU no launches; a look
    waits for the device once, for its measurements.
    """

    def __init__(self, s: Tree, tol: tuple[float, ...], blocks: int):
        batch, first = tree.batch_size(s), tree.leaves(s)[0]
        self.like, self.tiny = first.new_empty(()), torch.finfo(first.dtype).tiny
        self.tol = np.array(tol)
        self.value: Tree = s
        self.borrowed = True  # `value` is an iterate itself, not to be written to
        self.residual = np.full((batch, blocks), np.nan)
        self.merit = np.full(batch, np.inf)
        self.status = np.full(batch, int(Status.BUDGET))
        self.steps = np.zeros(batch, dtype=np.int64)
        self.rows = np.arange(batch)
        self.finished = np.zeros(batch, dtype=np.bool_)
        self.best_merit = np.full(batch, np.inf)
        self.best_doubt = np.zeros(batch)
        self.best_residual = np.full((batch, blocks), np.inf)
        self.trend = np.full(batch, np.inf)  # moving average of log(residual over tolerance)
        self.least = np.full(batch, np.inf)  # its smallest value
        self.least_defect = np.full(batch, np.inf)  # smallest |F(s) - s| of the first block
        self.lowest = np.full(batch, np.inf)  # defect at the last clear new low
        self.growing = np.zeros(batch, dtype=np.int64)  # looks in a row at which it had grown
        self.progress = np.zeros(batch, dtype=np.int64)  # step of the last progress

    def record(self, k: int, F: Map, s: Tree, now: Evaluation, *, last: bool) -> bool:
        """Judge the iterates `s`; True when every sample is finished."""
        with np.errstate(all="ignore"):  # what is not finite is answered below
            return self._record(k, F, s, now, last=last)

    def _record(self, k: int, F: Map, s: Tree, now: Evaluation, *, last: bool) -> bool:
        look = _Look.of(now)
        excess = (look.residual / self.tol).max(1)
        broken = look.broken
        diverged = self._diverged(look)
        self._track_best(k, now.value, look, excess, broken)
        status = np.full(len(self.rows), int(Status.BUDGET))
        status[k - self.progress >= STALL_STEPS] = int(Status.STALLED)
        status[broken] = int(Status.NON_FINITE)
        status[diverged] = int(Status.DIVERGED)
        status[~broken & (look.counted / self.tol <= 1).all(1)] = int(Status.CONVERGED)
        ended = ~self.finished & (last | (status != int(Status.BUDGET)))
        if not ended.any():
            return False
        behind = ended & (look.merit == np.inf) & ~broken if not last else np.zeros_like(ended)
        if behind.any():  # these alone: a neighbour that ends at the same look is returned as it was seen
            settled = F.measure(F.settled(s))
            self._store(k, settled.value, _Look.of(settled), status, behind)
        self._store(k, now.value, look, status, ended & ~behind)
        self.finished |= ended
        return bool(self.finished.all())

    def _diverged(self, look: _Look) -> Mask:
        """By the first block's absolute residual: a relative one stays at 1 however far the iterate runs away."""
        relative, defect = look.residual[:, 0], look.defect
        # a start at z = 0 has nothing to grow from: growth counts while the iterate also stays far from the map's value
        grown = (defect > DIVERGENCE_FACTOR * self.least_defect) & (relative > FAR)
        self.growing = np.where(grown, self.growing + 1, 0)
        runaway = (look.scale == np.inf) | (look.residual == np.inf).any(1)
        # a settled block may grow a thousandfold again, harmlessly, when another begins to move
        floor = np.maximum(defect, SETTLED * look.scale)
        # where f(z, x) = 0, as f(0, x) may be at the start, there is nothing that could grow
        known = look.scale > self.tiny
        self.least_defect = np.where(known, np.minimum(self.least_defect, floor), self.least_defect)
        return (self.growing >= GROWING_CHECKS) | runaway

    def _track_best(self, k: int, value: Tree, look: _Look, excess: Floats, broken: Mask) -> None:
        gained = self.best_merit - look.merit > STALL_GAIN * np.abs(self.best_merit)
        gained |= (self.best_merit == np.inf) & np.isfinite(look.merit)
        gained |= self._falling(excess, broken)
        if k > 0:  # a joint solve starts with z settled
            gained |= self._settling(look)
        self.progress[gained & ~broken] = k
        # while no iterate can be compared by merit, the latest finite one stands in
        better = ~broken & ~self.finished & ((look.merit < self.best_merit) | (self.best_merit == np.inf))
        self._keep(better, value)
        self.best_merit[better] = look.merit[better]
        self.best_doubt[better] = look.doubt[better]
        self.best_residual[better] = look.counted[better]

    def _settling(self, look: _Look) -> Mask:
        """Whether the first block's absolute residual reached a clear new low: on the way to an equilibrium at 0 the relative
        one stays what it is."""
        lower = look.defect < (1 - SETTLING) * self.lowest
        self.lowest = np.where(lower, look.defect, self.lowest)
        return lower

    def _falling(self, excess: Floats, broken: Mask) -> Mask:
        """Whether the residual's trend reached a new low: single residuals of an oscillating iteration say little."""
        log = np.log(np.maximum(excess, self.tiny))
        trend = np.where(np.isfinite(self.trend), self.trend + TREND_WEIGHT * (log - self.trend), log)
        self.trend = np.where(broken, self.trend, trend)
        falling = self.trend < self.least - STALL_GAIN
        self.least = np.minimum(self.least, self.trend)
        return falling

    def _keep(self, chosen: Mask, value: Tree) -> None:
        """Make the iterates of `chosen` the best of their samples."""
        if self.borrowed and chosen.all():
            self.value = value
        elif chosen.any():
            self._own()
            rows, positions = (self._tensor(part) for part in (self.rows[chosen], chosen.nonzero()[0]))
            for leaf, part in zip(tree.leaves(self.value), tree.leaves(tree.select(value, positions)), strict=True):
                leaf.index_copy_(0, rows, part)

    def _own(self) -> None:
        if self.borrowed:
            self.value, self.borrowed = tree.apply(torch.clone, self.value), False

    def _store(self, k: int, value: Tree, look: _Look, status: NDArray[np.int64], ended: Mask) -> None:
        doubt = (self.best_doubt + look.doubt) * np.where(status == int(Status.CONVERGED), SLOW_DOUBT, 1.0)
        accuracy = MERIT_ACCURACY * np.abs(self.best_merit) + doubt
        use_best = ~(look.merit <= self.best_merit + accuracy) & (self.best_residual[:, 0] < np.inf)
        status = np.where(use_best & (status == int(Status.CONVERGED)), int(Status.STALLED), status)
        # a sample that was never finite keeps its start
        self._keep(ended & ~use_best & ~look.broken, value)
        self._own()  # what is returned of finished samples must stay
        rows = self.rows[ended]
        self.residual[rows] = np.where(use_best[:, None], self.best_residual, look.counted)[ended]
        self.merit[rows] = np.where(use_best, self.best_merit, look.merit)[ended]
        self.status[rows] = status[ended]
        self.steps[rows] = k + 1

    def compaction(self, F: Map) -> Tensor | None:
        """Positions of the rows that `F` is to go on with, the unfinished and maybe others, when they are few enough
        (`COMPACTED`) of those in the iteration, else None."""
        rows = len(self.finished)
        count = F.kept(int((~self.finished).sum()), rows)
        if count > COMPACTED * rows:
            return None
        kept = np.sort(np.argsort(self.finished, kind="stable")[:count])
        for name in (
            "rows",
            "finished",
            "best_merit",
            "best_doubt",
            "best_residual",
            "least",
            "trend",
            "least_defect",
            "growing",
            "lowest",
            "progress",
        ):
            setattr(self, name, getattr(self, name)[kept])
        return self._tensor(kept)

    def trace_point(self, k: int, now: Evaluation) -> TracePoint:
        """Residuals and merits of step `k` in the rows of the whole batch."""
        residual = now.residual.new_full(self.residual.shape, torch.nan)
        merit = now.merit.new_full(self.merit.shape, torch.nan)
        rows = self._tensor(self.rows)
        residual[rows], merit[rows] = now.residual.detach(), now.merit.detach()
        return TracePoint(k, residual, merit)

    def solution(self, F: Map, trace: tuple[TracePoint, ...]) -> Solution[Any]:
        """What was recorded, of a solve of `F` whose samples are all finished."""
        residual, merit = (self._tensor(part).to(self.like.dtype) for part in (self.residual, self.merit))
        status, steps = self._tensor(self.status), self._tensor(self.steps)
        return Solution(self.value, residual, F.blocks, merit, status, steps, F.work, F, trace)

    def _tensor(self, part: NDArray[Any]) -> Tensor:
        return torch.from_numpy(part).to(self.like.device)


class _Look(NamedTuple):
    """The measurements of an `Evaluation`, of which they have the shapes."""

    residual: Floats
    remaining: Floats
    scale: Floats
    merit: Floats
    doubt: Floats

    @property
    def counted(self) -> Floats:
        """The residuals by which convergence is judged, and which are returned."""
        return np.concatenate((self.residual[:, :-1], self.residual[:, -1:] * self.remaining[:, None]), axis=1)

    @property
    def broken(self) -> Mask:
        """Where something is not finite; an infinite merit is one that can't be compared."""
        return ~np.isfinite(self.residual).all(1) | np.isnan(self.merit)

    @property
    def defect(self) -> Floats:
        """|F(s) - s| of the first block."""
        return self.residual[:, 0] * self.scale

    @classmethod
    def of(cls, now: Evaluation) -> _Look:
        rest = torch.stack((now.remaining, now.scale, now.merit, now.doubt), dim=1)
        table = torch.cat((now.residual, rest), dim=1).detach().cpu().double().numpy()
        return cls(table[:, :-4], *table[:, -4:].T)
