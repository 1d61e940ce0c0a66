"""What one evaluation of a map is, and the per-sample records of a solve: the best iterate, finished, failed and how."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from jiio import tree
from jiio.solution import Status, TracePoint, Work
from jiio.tree import Tree, wide

STALL_STEPS = 50
STALL_GAIN = 1e-3
TREND_WEIGHT = 0.2
DIVERGENCE_FACTOR = 1e3
SETTLED = 1e-2
FAR = 0.3
GROWING_CHECKS = 3
# Merits are known to about this share, and to their doubt; an earlier iterate is preferred only when it was better by more.
MERIT_ACCURACY = 1e-3
# Rows are taken out when at most this share of them is unfinished: copying the rest costs little beside an evaluation.
COMPACTED = 0.75


class Evaluation(NamedTuple):
    """One evaluation of a map at s.

    next: F(s).  residual: (batch, blocks), relative, measured at s.  scale: (batch,), what the first block's residual
    was divided by.  merit: (batch,), lower is better, infinite where iterates can't be compared by it yet, measured at s.
    doubt: (batch,), how far the merit may be off.
    """

    next: Tree
    residual: Tensor
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

    @property
    def compactable(self) -> bool:
        """Whether `select` works."""
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

    def finish(self, s: Tree, now: Evaluation) -> tuple[Tree, Evaluation]:
        """A last improvement of iterates whose budget ended, measured again."""
        ...

    def select(self, rows: Tensor) -> Map:
        """The map of the samples `rows`."""
        ...


class Book:
    """Per-sample records of one solve: `value`, `residual`, `merit`, `status`, `steps` for the whole batch, and for
    the rows still in the iteration the signs of failure. `value` is the best iterate so far of a row in the iteration,
    and what is returned of a finished one: one state serves for both."""

    def __init__(self, s: Tree, tol: tuple[float, ...], blocks: int):
        batch = tree.batch_size(s)
        first = tree.leaves(s)[0]
        self.value = tree.apply(torch.clone, s)
        self.residual = first.new_full((batch, blocks), torch.nan)
        self.merit = first.new_full((batch,), torch.inf)
        self.status = torch.full((batch,), int(Status.BUDGET), device=first.device)
        self.steps = torch.zeros(batch, dtype=torch.long, device=first.device)
        self.tol = first.new_tensor(tol)
        self.rows = torch.arange(batch, device=first.device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=first.device)
        self.best_merit = first.new_full((batch,), torch.inf)
        self.best_doubt = first.new_zeros(batch)
        self.best_residual = first.new_full((batch, blocks), torch.inf)
        self.trend = first.new_full((batch,), torch.inf)  # moving average of log(residual over tolerance)
        self.least = first.new_full((batch,), torch.inf)  # its smallest value
        self.least_defect = first.new_full((batch,), torch.inf)  # smallest |F(s) - s| of the first block
        self.growing = torch.zeros(batch, dtype=torch.long, device=first.device)  # looks in a row at which it had grown
        self.progress = torch.zeros(batch, dtype=torch.long, device=first.device)  # step of the last progress

    def record(self, k: int, F: Map, s: Tree, now: Evaluation, *, last: bool) -> bool:
        """Judge the iterates `s`; True when every sample is finished."""
        excess = (now.residual / self.tol).amax(1)
        broken = ~excess.isfinite() | now.merit.isnan()
        diverged = self._diverged(now, excess)
        converged = ~broken & (excess <= 1)
        self._track_best(k, s, now, excess, broken)
        status = torch.full_like(self.progress, int(Status.BUDGET))
        status[k - self.progress >= STALL_STEPS] = int(Status.STALLED)
        status[diverged] = int(Status.DIVERGED)
        status[broken & ~diverged] = int(Status.NON_FINITE)
        status[converged] = int(Status.CONVERGED)
        ended = (status != int(Status.BUDGET)) & ~self.finished
        if last:
            ended = ~self.finished
        if not bool(ended.any()):
            return False
        unfinished_merit = ended & (now.merit == torch.inf) & ~broken
        if bool(unfinished_merit.any()):
            s, now = F.finish(s, now)
        self._store(k, s, now, status, ended)
        self.finished = self.finished | ended
        return bool(self.finished.all())

    def _diverged(self, now: Evaluation, excess: Tensor) -> Tensor:
        """By the first block's absolute residual: a relative one stays at 1 however far the iterate runs away."""
        defect = now.residual[:, 0] * now.scale
        # a start at z = 0 has nothing to grow from: growth counts while the iterate also stays far from the map's value
        grown = (defect > DIVERGENCE_FACTOR * self.least_defect) & (now.residual[:, 0] > FAR)
        self.growing = torch.where(grown, self.growing + 1, 0)
        runaway = (now.scale == torch.inf) | (excess == torch.inf)
        # a settled block may grow a thousandfold again, harmlessly, when another begins to move
        floor = torch.maximum(defect, SETTLED * now.scale)
        # with f(0, x) = 0 at the start there is nothing yet that could grow
        unknown = floor.isnan() | (floor < torch.finfo(floor.dtype).tiny)
        self.least_defect = torch.where(unknown, self.least_defect, torch.minimum(self.least_defect, floor))
        return (self.growing >= GROWING_CHECKS) | runaway

    def _track_best(self, k: int, s: Tree, now: Evaluation, excess: Tensor, broken: Tensor) -> None:
        gained = self.best_merit - now.merit > STALL_GAIN * self.best_merit.abs()
        gained |= (self.best_merit == torch.inf) & now.merit.isfinite()
        gained |= self._falling(excess, broken)
        self.progress = torch.where(gained & ~broken, k, self.progress)
        # while no iterate can be compared by merit, the latest finite one stands in
        better = ~broken & ~self.finished & ((now.merit < self.best_merit) | (self.best_merit == torch.inf))
        self._keep(better, s)
        self.best_merit = torch.where(better, now.merit, self.best_merit)
        self.best_doubt = torch.where(better, now.doubt, self.best_doubt)
        self.best_residual = torch.where(better[:, None], now.residual, self.best_residual)

    def _falling(self, excess: Tensor, broken: Tensor) -> Tensor:
        """Whether the residual's trend reached a new low: single residuals of an oscillating iteration say little."""
        log = excess.clamp_min(torch.finfo(excess.dtype).tiny).log()
        trend = torch.where(self.trend.isfinite(), torch.lerp(self.trend, log, TREND_WEIGHT), log)
        self.trend = torch.where(broken, self.trend, trend)
        falling = self.trend < self.least - STALL_GAIN
        self.least = torch.minimum(self.least, self.trend)
        return falling

    def _store(self, k: int, s: Tree, now: Evaluation, status: Tensor, ended: Tensor) -> None:
        accuracy = MERIT_ACCURACY * self.best_merit.abs() + self.best_doubt + now.doubt
        use_best = ~(now.merit <= self.best_merit + accuracy) & (self.best_residual[:, 0] < torch.inf)
        status = torch.where(use_best & (status == int(Status.CONVERGED)), int(Status.STALLED), status)
        self._keep(ended & ~use_best, s)
        rows, where = self.rows[ended], ended.nonzero()[:, 0]
        self.residual[rows] = torch.where(use_best[:, None], self.best_residual, now.residual)[where]
        self.merit[rows] = torch.where(use_best, self.best_merit, now.merit)[where]
        self.status[rows] = status[where]
        self.steps[rows] = k + 1

    def _keep(self, mask: Tensor, s: Tree) -> None:
        """Write the iterates of `mask` into `value`, in place and without waiting for the device."""
        whole = len(self.rows) == len(self.status)
        for target, source in zip(tree.leaves(self.value), tree.leaves(s), strict=True):
            choice = wide(mask, source)
            if whole:
                torch.where(choice, source, target, out=target)
            else:
                target[self.rows] = torch.where(choice, source, target[self.rows])

    def compaction(self) -> Tensor | None:
        """Positions of the unfinished rows when they are few enough (`COMPACTED`) of those in the iteration, else None."""
        unfinished = (~self.finished).nonzero()[:, 0]
        if len(unfinished) > COMPACTED * len(self.finished):
            return None
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
            "progress",
        ):
            setattr(self, name, getattr(self, name)[unfinished])
        return unfinished

    def trace_point(self, k: int, now: Evaluation) -> TracePoint:
        """Residuals and merits of step `k` in the rows of the whole batch."""
        residual, merit = torch.full_like(self.residual, torch.nan), torch.full_like(self.merit, torch.nan)
        residual[self.rows], merit[self.rows] = now.residual.detach(), now.merit.detach()
        return TracePoint(k, residual, merit)
