"""The loop of every solve: stopping, freezing, compaction; the best iterate and failure are its `Book`'s."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor

from jiio import tree
from jiio.book import Book, Evaluation, Map
from jiio.solution import OnFailure, Solution, TracePoint, Work, settle_failure
from jiio.solver import Anderson, Solver, is_solver, require_count
from jiio.tree import Tree

# Steps between looks at the residuals of a long solve, which are measured for a look alone. Each look synchronises with
# the device once; a sample that converges between two looks takes up to two steps too many. A solve of z or mu alone takes
# some five steps and looks at each.
CHECK_EVERY = 3
Callback = Callable[[int, Tree, "Evaluation"], None]


class OneBlock(ABC):
    """What maps of one block have in common: every iterate is feasible, nothing lags, and the residual is the merit."""

    @abstractmethod
    def advance(self, s: Tree, k: int) -> Tree:
        """F(s)."""

    def evaluate(self, s: Tree, k: int) -> Evaluation:
        """F(s) and |F(s) - s| / |F(s)|."""
        fs = self.advance(s, k)
        residual, size = relative(tree.apply(torch.sub, fs, s), fs)
        one, zero = torch.ones_like(residual), torch.zeros_like(residual)
        return Evaluation(fs, s, residual[:, None], one, size, residual, zero)

    def measure(self, s: Tree) -> Evaluation:
        """An evaluation as any other."""
        return self.evaluate(s, 0)

    def kept(self, unfinished: int, rows: int) -> int:
        """All of them."""
        return rows

    def project(self, s: Tree) -> Tree:
        """`s`."""
        return s

    def settled(self, s: Tree) -> Tree:
        """`s`."""
        return s


@dataclass(frozen=True)
class PlainMap(OneBlock):
    """A function F(s) of the whole batch; samples are frozen but never taken out, since F may hide data of its own."""

    function: Callable[[Tree], Tree]
    work: Work
    blocks: tuple[str, ...] = ("s",)
    symmetric: bool = False

    def advance(self, s: Tree, k: int) -> Tree:
        """F(s)."""
        with torch.no_grad():
            fs = called("F", self.function, s)
        if k == 0:
            require_same_form("F", s, fs)
        self.work.add(f=tree.batch_size(s))
        return fs

    def residual(self, s: Tree) -> Tree:
        """F(s) - s, with graph."""
        return tree.apply(torch.sub, self.function(s), s)

    def select(self, rows: Tensor) -> PlainMap:
        """Refused: F is a function of the whole batch."""
        raise TypeError("a plain map can't be restricted to some samples")


def relative(defect: Tree, fs: Tree, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """|defect| / |fs| and |fs| of each sample; 0 where both vanish, 1 / eps where fs alone does: an iterate may pass there.

    floor: sizes (batch,) that |fs| counts as where it is smaller.
    """
    difference = tree.norm(defect)
    limits = torch.finfo(difference.dtype)
    size = tree.norm(fs).clamp_min(limits.tiny)
    if floor is not None:
        size = torch.maximum(size, floor)
    return part_of(size, difference).clamp_max(1 / limits.eps), size


def part_of(size: Tensor, difference: Tensor) -> Tensor:
    """difference / size; NaN where the size is beyond all floats, of which any difference would seem to be nothing."""
    return torch.where(size.isinf(), torch.nan, difference / size)


def called(name: str, function: Callable[[Tree], Tree], s: Tree) -> Tree:
    """function(s); `ValueError` where it wrote to `s`, which would then seem to be a fixed point."""
    seen = [leaf for leaf in tree.leaves(s) if not leaf.is_inference()]  # these do not count their changes
    versions = [leaf._version for leaf in seen]
    fs = function(s)
    if [leaf._version for leaf in seen] != versions:
        raise ValueError(
            f"{name} changed in place what it was given, or what it returned before: let it return new tensors"
        )
    return fs


def require_same_form(name: str, s: Tree, fs: Tree) -> None:
    """`ValueError` with both shapes when `fs` has not the shapes and dtypes of `s`."""
    a, b = tree.leaves(s), tree.leaves(fs)
    if tree.outline(s) != tree.outline(fs):
        raise ValueError(
            f"{name} must return the tree it was given: it got {tree.outline(s)} and returned {tree.outline(fs)}"
        )
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
    require_count("max_steps", max_steps)
    for value in tol if isinstance(tol, tuple) else (tol,):
        if not isinstance(value, Real):
            raise ValueError(f"tol is a number, or of a joint solve a tuple of three; got {value!r}")
        if not value > 0:
            raise ValueError(f"tol must be positive, got {tol}")


def check_options(solver: Solver, on_failure: OnFailure) -> None:
    """`ValueError` for a solver or an answer to failure that is none."""
    if not is_solver(solver):
        raise ValueError(f"solver is an instance such as Picard() or Anderson(history=5), got {solver!r}")
    check_answer(on_failure)


def check_answer(on_failure: OnFailure) -> None:
    """`ValueError` for an answer to failure that is none."""
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure is 'warn', 'raise' or 'ignore', got {on_failure!r}")


def require_samples(start: Tree) -> None:
    """`ValueError` for an empty batch."""
    if not tree.batch_size(start):
        shapes = [tuple(leaf.shape) for leaf in tree.leaves(start)]
        raise ValueError(f"the batch is empty, there is nothing to solve: the start has shapes {shapes}")


def check_start(start: Tree) -> None:
    """`ValueError` for a start that is no tree of finite floats of at least one sample."""
    require_samples(start)
    for leaf in tree.leaves(start):
        tree.inside(leaf)
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
    check_options(solver, on_failure)
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
    check_every: int = CHECK_EVERY,
) -> Solution[Any]:
    """Iterate `F` from `start`. The returned iterate of a sample is always one that was evaluated itself.

    A sample that is finished is recorded and never touched again; when most of the batch is finished, its rows are
    taken out, so that they cost nothing more. Memory: the best iterates, s and F(s), beside the solver's.
    """
    require_samples(start)
    whole = F
    s = tree.detach(start)
    del start  # of no more use after the first step
    memory = solver.init(s)
    book = Book(s, tol, len(F.blocks))
    points: list[TracePoint] = []
    for k in range(max_steps):
        last = k == max_steps - 1
        if last:  # the last evaluation measures what is returned
            memory, s = (), F.settled(s)
        looked_at = last or k % check_every == 0
        if looked_at or trace or callback is not None:
            now = F.evaluate(s, k)
            if trace:
                points.append(book.trace_point(k, now))
            if callback is not None:
                callback(k, now.value, now)
            if looked_at and book.record(k, F, s, now, last=last):
                break
            fs = now.next
            del now
        else:
            fs = F.advance(s, k)
        s, memory = solver.step(memory, k, s, fs)
        if s is not fs:  # mixing leaves the set
            s = F.project(s)
        del fs
        if k % check_every == 0 and (rows := book.compaction(F)) is not None:
            s, memory, F = tree.select(s, rows), tree.select(memory, rows), F.select(rows)
    return book.solution(whole, tuple(points))
