"""The only loop of the library: stopping, freezing, compaction, the best iterate, failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from jiio import tree
from jiio.solution import OnFailure, Solution, Status, TracePoint, Work, settle_failure
from jiio.solver import Anderson, Solver
from jiio.tree import Tree

# Steps between looks at the residuals. Each look synchronises with the device once; a sample that converges between
# two looks takes up to three steps too many.
CHECK_EVERY = 4
STALL_STEPS = 50
STALL_GAIN = 1e-3
TREND_WEIGHT = 0.2
DIVERGENCE_FACTOR = 1e3
SETTLED = 1e-2
FAR = 0.3
GROWING_CHECKS = 3
# Merits are known to about this share; an earlier iterate is preferred only when it was better by more.
MERIT_ACCURACY = 1e-3
Callback = Callable[[int, Tree, "Evaluation"], None]


class Evaluation(NamedTuple):
    """One evaluation of a map at s.

    next: F(s).  residual: (batch, blocks), relative, measured at s.  scale: (batch,), what the first block's residual
    was divided by.  merit: (batch,), lower is better, infinite where iterates can't be compared by it yet, measured at s.
    """

    next: Tree
    residual: Tensor
    scale: Tensor
    merit: Tensor


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
        """Evaluate at `s`, the iterate of step `k`."""
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


@dataclass(frozen=True)
class PlainMap:
    """A function F(s) of the whole batch; samples are frozen but never taken out, since F may hide data of its own."""

    function: Callable[[Tree], Tree]
    work: Work
    blocks: tuple[str, ...] = ("s",)
    compactable: bool = False

    def evaluate(self, s: Tree, k: int) -> Evaluation:
        """F(s) and |F(s) - s| / |F(s)|."""
        with torch.no_grad():
            fs = self.function(s)
        if k == 0:
            require_same_form("F", s, fs)
        self.work.add(f=tree.batch_size(s))
        return compared(s, fs)

    def residual(self, s: Tree) -> Tree:
        """F(s) - s, with graph."""
        return tree.apply(torch.sub, self.function(s), s)

    symmetric = False

    def project(self, s: Tree) -> Tree:
        """Every iterate is feasible."""
        return s

    def finish(self, s: Tree, now: Evaluation) -> tuple[Tree, Evaluation]:
        """Nothing to improve."""
        return s, now

    def select(self, rows: Tensor) -> PlainMap:
        """Refused: F is a function of the whole batch."""
        raise TypeError("a plain map can't be restricted to some samples")


def relative_residual(s: Tree, fs: Tree) -> tuple[Tensor, Tensor]:
    """|fs - s| / |fs| and |fs| of each sample; 0 where both vanish."""
    difference = tree.norm(tree.apply(torch.sub, fs, s))
    size = tree.norm(fs).clamp_min(torch.finfo(difference.dtype).tiny)
    return difference / size, size


def compared(s: Tree, fs: Tree) -> Evaluation:
    """The evaluation of a map of one block, whose merit is its residual."""
    residual, size = relative_residual(s, fs)
    return Evaluation(fs, residual[:, None], size, residual)


def require_same_form(name: str, s: Tree, fs: Tree) -> None:
    """`ValueError` with both shapes when `fs` has not the shapes and dtypes of `s`."""
    a, b = tree.leaves(s), tree.leaves(fs)
    if [leaf.shape for leaf in a] != [leaf.shape for leaf in b]:
        shapes = ([tuple(leaf.shape) for leaf in a], [tuple(leaf.shape) for leaf in b])
        raise ValueError(f"{name} must return the shape it was given: it got {shapes[0]} and returned {shapes[1]}")
    if [leaf.dtype for leaf in a] != [leaf.dtype for leaf in b]:
        dtypes = ([leaf.dtype for leaf in a], [leaf.dtype for leaf in b])
        raise ValueError(
            f"{name} must keep the dtype: it got {dtypes[0]} and returned {dtypes[1]}; declare mixed precision with "
            "Problem(compute_dtype=...)"
        )


def check_budget(max_steps: int, tol: float | tuple[float, ...]) -> None:
    """`ValueError` for a budget or a tolerance that can't be meant."""
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    for value in tol if isinstance(tol, tuple) else (tol,):
        if not value > 0:
            raise ValueError(f"tol must be positive, got {tol}")


def check_start(start: Tree) -> None:
    """`ValueError` for a start that is no tree of finite floats."""
    tree.batch_size(start)
    for leaf in tree.leaves(start):
        if not leaf.is_floating_point():
            raise ValueError(f"every leaf of the start must be a float tensor, got {leaf.dtype}")
    if not bool((ok := tree.finite(start)).all()):
        raise ValueError(f"the start has NaN or infinity in samples {(~ok).nonzero()[:, 0].tolist()[:10]}")


def fixed_point(
    F: Callable[[Tree], Tree],
    start: Tree,
    *,
    solver: Solver = Anderson(),
    max_steps: int = 100,
    tol: float = 1e-4,
    on_failure: OnFailure = "warn",
    callback: Callback | None = None,
    trace: bool = False,
) -> Solution[Any]:
    """Solve s = F(s) for every sample of a batch. No graph is built; `implicit` differentiates the solution.

    F takes and returns a tree of (batch, ...) float tensors. A sample has converged when |F(s) - s| / |F(s)| <= `tol`.

    >>> solution = fixed_point(torch.cos, torch.ones(2, 1))
    >>> bool(solution.converged.all()), round(float(solution.value[0]), 4)
    (True, 0.7391)
    """
    check_budget(max_steps, tol)
    check_start(start)
    solution = iterate(
        PlainMap(F, Work()),
        start,
        solver=solver,
        max_steps=max_steps,
        tol=(tol,),
        callback=callback,
        trace=trace,
    )
    return settle_failure(solution, solution.residual.new_tensor([tol]), on_failure)


def iterate(
    F: Map,
    start: Tree,
    *,
    solver: Solver,
    max_steps: int,
    tol: tuple[float, ...],
    callback: Callback | None = None,
    trace: bool = False,
) -> Solution[Any]:
    """Iterate `F` from `start`. The returned iterate of a sample is always one that was evaluated itself.

    A sample that is finished is recorded and never touched again; when most of the batch is finished, its rows are
    taken out, so that they cost nothing more.
    """
    whole, work = F, F.work
    s = tree.apply(lambda leaf: leaf.detach().clone(), start)
    memory = solver.init(s)
    book = _Book(s, tol, len(F.blocks))
    points: list[TracePoint] = []
    for k in range(max_steps):
        now = F.evaluate(s, k)
        if trace:
            points.append(book.trace_point(k, now))
        if callback is not None:
            callback(k, s, now)
        last = k == max_steps - 1
        if (last or k % CHECK_EVERY == 0) and book.record(k, F, s, now, last=last):
            break
        s, memory = solver.step(memory, k, s, now.next)
        s = F.project(s)
        if F.compactable and k % CHECK_EVERY == 0 and (rows := book.compaction()) is not None:
            s, memory, F = tree.select(s, rows), tree.select(memory, rows), F.select(rows)
    return Solution(
        book.value, book.residual, whole.blocks, book.merit, book.status, book.steps, work, whole, tuple(points)
    )


class _Book:
    """Per-sample records of one solve: `value`, `residual`, `merit`, `status`, `steps` for the whole batch, and for
    the rows still in the iteration the best iterate so far and the signs of failure."""

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
        self.best = s
        self.best_merit = first.new_full((batch,), torch.inf)
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
        self.least_defect = torch.where(floor.isnan(), self.least_defect, torch.minimum(self.least_defect, floor))
        return (self.growing >= GROWING_CHECKS) | runaway

    def _track_best(self, k: int, s: Tree, now: Evaluation, excess: Tensor, broken: Tensor) -> None:
        gained = self.best_merit - now.merit > STALL_GAIN * self.best_merit.abs()
        gained |= (self.best_merit == torch.inf) & now.merit.isfinite()
        gained |= self._falling(excess, broken)
        self.progress = torch.where(gained & ~broken, k, self.progress)
        # while no iterate can be compared by merit, the latest finite one stands in
        better = ~broken & ((now.merit < self.best_merit) | (self.best_merit == torch.inf))
        self.best = tree.where(better, s, self.best)
        self.best_merit = torch.where(better, now.merit, self.best_merit)
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
        accuracy = MERIT_ACCURACY * self.best_merit.abs()
        use_best = ~(now.merit <= self.best_merit + accuracy) & (self.best_residual[:, 0] < torch.inf)
        status = torch.where(use_best & (status == int(Status.CONVERGED)), int(Status.STALLED), status)
        value = tree.where(use_best, self.best, s)
        rows, where = self.rows[ended], ended.nonzero()[:, 0]
        for target, source in zip(tree.leaves(self.value), tree.leaves(value), strict=True):
            target[rows] = source[where]
        self.residual[rows] = torch.where(use_best[:, None], self.best_residual, now.residual)[where]
        self.merit[rows] = torch.where(use_best, self.best_merit, now.merit)[where]
        self.status[rows] = status[where]
        self.steps[rows] = k + 1

    def compaction(self) -> Tensor | None:
        """Positions of the unfinished rows when they are at most half of those in the iteration, else None."""
        unfinished = (~self.finished).nonzero()[:, 0]
        if len(unfinished) > len(self.finished) // 2:
            return None
        for name in (
            "rows",
            "finished",
            "best_merit",
            "best_residual",
            "least",
            "trend",
            "least_defect",
            "growing",
            "progress",
        ):
            setattr(self, name, getattr(self, name)[unfinished])
        self.best = tree.select(self.best, unfinished)
        return unfinished

    def trace_point(self, k: int, now: Evaluation) -> TracePoint:
        """Residuals and merits of step `k` in the rows of the whole batch."""
        residual, merit = torch.full_like(self.residual, torch.nan), torch.full_like(self.merit, torch.nan)
        residual[self.rows], merit[self.rows] = now.residual.detach(), now.merit.detach()
        return TracePoint(k, residual, merit)
