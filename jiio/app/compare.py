"""Work and time to a re-solved cost: how methods are compared (docs/measuring.md).

A method is traced once, off the clock, to find how many steps it needs until the mean re-solved cost of the batch falls
to each target; then exactly that many steps are timed, methods interleaved.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jiio import tree
from jiio.app.methods import Method
from jiio.joint import equilibrium
from jiio.problem import Problem, State
from jiio.solution import Work

RESOLVE_TOL = 1e-5
Timed = dict[int, tuple[float, Work]]  # by number of steps


@dataclass(frozen=True)
class Row:
    """One method at one target. f, vjp, cost_grad: evaluations a sample; work: these weighted by their measured prices,
    f = 1. seconds is a median of `repeats` runs, fastest and slowest their range. `steps` is None where the target was not
    reached within the budget. resolved: whether z could be solved for where the method was traced last."""

    method: str
    target: float
    steps: int | None
    seconds: float | None
    fastest: float | None
    slowest: float | None
    f: float | None
    vjp: float | None
    cost_grad: float | None
    work: float | None
    repeats: int
    resolved: bool


@dataclass(frozen=True)
class Prices:
    """Seconds of one evaluation of the whole batch, by kind."""

    f: float
    vjp: float
    cost_grad: float

    def weigh(self, work: Work) -> float:
        """Work in evaluations of f."""
        return (work.f * self.f + work.vjp * self.vjp + work.cost_grad * self.cost_grad) / self.f


def resolved_cost(problem: Problem, z: Any, x: Tensor) -> Tensor:
    """cost(z*(x), x) with z solved from the guess to a relative residual of 1e-5, (batch,)."""
    return resolve(problem, z, x)[1]


def resolve(problem: Problem, z: Any, x: Tensor) -> tuple[Any, Tensor]:
    """z*(x), from the guess to a relative residual of 1e-5, and cost(z*(x), x), (batch,), infinite where z does not get there:
    the cost of something else could look better than any."""
    solved = equilibrium(problem, z, x, work=Work(), tol=RESOLVE_TOL, max_steps=500)
    with torch.no_grad():
        cost = problem.cost(solved.value, x, *problem.context)
    return solved.value, cost.masked_fill(~solved.converged, torch.inf)


class _Enough(Exception):
    """Ends a traced run from within its callback."""


def whole_batch(problem: Problem) -> Problem:
    """The same problem with its context in a closure: finished samples are not taken out, so that a callback sees all."""
    return Problem(problem.evaluate, lambda z, x: problem.cost(z, x, *problem.context), problem.constraint)


def trace(
    method: Method, problem: Problem, start: State, *, steps: int, every: int = 1, until: float = 0.0
) -> list[tuple[int, float]]:
    """(step, mean re-solved cost) along one run, which ends at a cost of `until`."""
    points: list[tuple[int, float]] = []
    z = start.z

    def watch(k: int, x: Tensor, work: Work | None) -> None:
        nonlocal z
        if k % every == 0 or k < 20:
            z, cost = resolve(problem, z, x)
            points.append((k, float(cost.mean())))
            if points[-1][1] <= until:
                raise _Enough

    with suppress(_Enough):
        method.run(whole_batch(problem), start, steps, watch)
    return points


def steps_to(points: list[tuple[int, float]], target: float) -> int | None:
    """The first step at or below `target`, None if there is none.

    >>> steps_to([(0, 3.0), (1, 1.0)], 2.0), steps_to([(0, math.inf)], math.inf)
    (1, None)
    """
    return next((k for k, cost in points if cost <= target and math.isfinite(cost)), None)


def compare(
    methods: dict[str, Method],
    problem: Problem,
    start: State,
    *,
    targets: dict[str, float],
    budgets: dict[str, int],
    repeats: int = 5,
) -> tuple[list[Row], Prices]:
    """Every method to every target: steps from one trace each, then medians of `repeats` interleaved timings."""
    prices = measure_prices(problem, start)
    least = min(targets.values())
    traces = {name: trace(run, problem, start, steps=budgets[name], until=least) for name, run in methods.items()}
    needed = {name: [steps_to(points, target) for target in targets.values()] for name, points in traces.items()}
    reached = {name: {k for k in steps if k is not None} for name, steps in needed.items()}
    runs: dict[str, list[Timed]] = {name: [] for name in methods}
    names = [name for name in methods if reached[name]]
    for repeat in range(repeats):
        # in an order of its own, else a method would always find the caches as the same other one leaves them
        for name in random.Random(repeat).sample(names, len(names)):
            runs[name].append(timed(methods[name], problem, start, reached[name]))
    rows = [
        _row(name, target, k, [run[k] for run in runs[name]], prices, len(start.x))
        if k is not None
        else _unreached(name, target, traces[name])
        for name in methods
        for target, k in zip(targets.values(), needed[name], strict=True)
    ]
    return rows, prices


def timed(method: Method, problem: Problem, start: State, stops: set[int]) -> Timed:
    """Seconds and work to each of these numbers of steps: of a method in rounds all from one run, of any other from a run
    each."""
    found: Timed = {}
    began = clock()

    def look(k: int, x: Tensor, work: Work | None) -> None:
        if k in stops and work is not None:
            found[k] = clock() - began, replace(work)

    if method.in_rounds:
        method.run(problem, start, max(stops), look)
        return found
    for steps in sorted(stops):
        began = clock()
        work = method.run(problem, start, steps, None)
        found[steps] = clock() - began, work
    return found


def _row(method: str, target: float, steps: int, runs: list[tuple[float, Work]], prices: Prices, batch: int) -> Row:
    seconds, work = [each for each, _ in runs], runs[-1][1]
    return Row(
        method, target, steps, statistics.median(seconds), min(seconds), max(seconds), **work.each(batch),
        work=prices.weigh(work) / batch, repeats=len(runs), resolved=True,
    )  # fmt: skip


def _unreached(method: str, target: float, points: list[tuple[int, float]]) -> Row:
    resolved = math.isfinite(points[-1][1])
    return Row(method, target, None, None, None, None, None, None, None, None, repeats=0, resolved=resolved)


def measure_prices(problem: Problem, start: State, *, repeats: int = 15) -> Prices:
    """Medians of bare evaluations on the batch: f without graph; f with VJP less that; gradient of cost."""
    x = start.x
    z = equilibrium(problem, start.z, x, work=Work(), tol=1e-3).value
    mu = tree.apply(torch.randn_like, z)
    timings: dict[str, list[float]] = {"f": [], "pull": [], "cost": []}
    for _ in range(repeats + 3):
        for name, call in (
            ("f", lambda: _forward(problem, z, x)),
            ("pull", lambda: _pull(problem, z, x, mu)),
            ("cost", lambda: _cost_gradient(problem, z, x)),
        ):
            began = clock()
            call()
            timings[name].append(clock() - began)
    f, pull, cost = (statistics.median(timings[name][3:]) for name in ("f", "pull", "cost"))
    return Prices(f, max(pull - f, 0.0), cost)


def clock() -> float:
    """Seconds, read when the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_step(problem: Problem, state: State) -> None:
    """A bare forward, VJP of f and cost gradient: what a joint step is measured against."""
    _pull(problem, state.z, state.x, state.mu)
    _cost_gradient(problem, state.z, state.x)


def _leaves(z: Any, x: Tensor) -> list[Tensor]:
    return [leaf.detach().requires_grad_() for leaf in (*tree.leaves(z), x)]


def _forward(problem: Problem, z: Any, x: Tensor) -> None:
    with torch.no_grad():
        problem.evaluate(z, x)


def _pull(problem: Problem, z: Any, x: Tensor, mu: Any) -> None:
    leaves = _leaves(z, x)
    outputs = tree.leaves(problem.evaluate(tree.build(z, leaves[:-1]), leaves[-1]))
    torch.autograd.grad(outputs, leaves, tree.leaves(mu), allow_unused=True)


def _cost_gradient(problem: Problem, z: Any, x: Tensor) -> None:
    leaves = _leaves(z, x)
    cost = problem.cost(tree.build(z, leaves[:-1]), leaves[-1], *problem.context)
    torch.autograd.grad(cost.sum(), leaves, allow_unused=True)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as plain dictionaries."""
    return [asdict(row) | {"reached": row.steps is not None} for row in rows]


def tune(methods: dict[str, Method], problem: Problem, start: State, *, target: float, steps: int) -> str:
    """The name of the method that reaches `target` with the least weighted work on this batch; of none does, the one
    with the lowest cost after `steps`."""
    prices = measure_prices(problem, start, repeats=5)
    best, best_key = "", (2, float("inf"))
    for name, method in methods.items():
        points = trace(method, problem, start, steps=steps, every=2, until=target)
        needed = steps_to(points, target)
        if needed is None:
            key = (1, min(cost for _, cost in points))
        else:
            key = (0, prices.weigh(method.run(problem, start, needed, None)))
        if key < best_key:
            best, best_key = name, key
    return best


def reference_cost(problem: Problem, starts: list[State], methods: list[Method], *, steps: int) -> float:
    """Mean over the batch of each sample's best re-solved cost by long runs of several methods from several starts."""
    best: Tensor | None = None
    for start in starts:
        for method in methods:
            last: dict[str, Tensor] = {}

            def watch(k: int, x: Tensor, work: Work | None, last: dict[str, Tensor] = last) -> None:
                last["x"] = x

            method.run(whole_batch(problem), start, steps, watch)
            cost = resolved_cost(problem, start.z, last["x"])
            best = cost if best is None else torch.minimum(best, cost)
    assert best is not None
    return float(best.mean())
