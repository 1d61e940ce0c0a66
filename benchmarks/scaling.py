"""When does the joint solve win over nested ones, and by how much, as the problem grows or becomes harder?

    python -m benchmarks.scaling [--quick] [--json FILE] [--figure FILE] [--threads N] [--seeds N]

On problems whose contraction, condition and sizes are set exactly (benchmarks/synthetic.py), one of them varied at a
time: work and wall time of every method until the mean re-solved cost is within 1.2 times the best known one, and its peak
memory. Work of a sample counts evaluations of f, vector-Jacobian products and cost gradients, weighted by their bare prices
on the same batch in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import jiio
from benchmarks.memory import peak_bytes
from benchmarks.synthetic import Family, make
from jiio import Problem, State, Step, newton_step, tree
from jiio.app import compare
from jiio.app.methods import Joint, Method, Nested
from jiio.app.table import console, show
from jiio.optimizer import LBFGS, Adam

SHARE = 1.2
ADAM_RATES = (0.1, 0.3)
BUDGET, QUICK_BUDGET = 80, 40
MATRIX_RATE = 0.3  # without the tangent
TUNED = 8  # samples that settings are chosen on
MEMORY_STEPS = 8  # more hold no more: tests/test_memory.py
BASE = Family(batch=16)
AXES: dict[str, tuple[float, ...]] = {
    "contraction": (0.5, 0.8, 0.95, 0.99),
    "latent": (16, 64, 256, 512),
    "state": (128, 512, 2048, 8192),
    "batch": (1, 8, 64, 512),
    "condition": (1, 30, 1000),
}
QUICK_AXES: dict[str, tuple[float, ...]] = {"contraction": (0.5, 0.9)}


@dataclass(frozen=True)
class Point:
    """One problem to measure: where it lies on which axis, the batch that settings are tuned on, and that of the figures."""

    axis: str
    value: float
    tuning: tuple[Problem, State]
    measured: tuple[Problem, State]


def main() -> None:
    """Measure, print one table, write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two points, one seed, one repeat: a minute")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds, repeats = (1, 1) if options.quick else (options.seeds, 3)
    points = [point for seed in range(seeds) for point in all_points(seed, quick=options.quick)]
    budget = QUICK_BUDGET if options.quick else BUDGET
    rows: list[dict[str, Any]] = []
    for point in track(points, description="scaling", console=console, transient=True):
        rows += measure(point, budget=budget, repeats=repeats)
        if options.json:
            write(options, rows, {"seeds": seeds, "repeats": repeats, "budget": budget})
    report(rows)
    if options.figure:
        from benchmarks.scaling_figure import draw

        console.print(f"figure: {draw(rows, options.figure)}")


def write(options: argparse.Namespace, rows: list[dict[str, Any]], settings: dict[str, int]) -> None:
    """The rows so far, with what they were measured on."""
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "jiio": jiio.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "share": SHARE,
    }
    options.json.write_text(json.dumps({**facts, **settings, "base": asdict(BASE), "rows": rows}, indent=1))


def all_points(seed: int, *, quick: bool) -> Iterator[Point]:
    """The axes of the family."""
    for axis, values in (QUICK_AXES if quick else AXES).items():
        for value in values:
            kind = type(getattr(BASE, axis))
            family = replace(BASE, **{axis: kind(value), "seed": seed})
            tuning = make(replace(family, batch=min(family.batch, TUNED)), tuning=True)
            yield Point(axis, value, tuning, make(family))


def methods(problem: Problem, start: State) -> dict[str, dict[str, Method]]:
    """Every method with its settings. One average matrix and tangent belong to the model, so their price is not counted;
    L-BFGS gets the matrix that the joint solve gets."""
    step = model_step(problem, start)
    initial = replace(step.rule, rate=1.0)
    return {
        "joint, model's step": {"default": Joint(step)},
        "joint, model's matrix": {"default": Joint(Step(replace(step.rule, rate=MATRIX_RATE)))},
        "joint, automatic": {"default": Joint(None)},
        "nested warm L-BFGS": {"default": Nested(LBFGS(initial=initial), True, 3e-2)},
        "nested cold Adam": {f"rate {r}": Nested(Adam(r), False) for r in ADAM_RATES},
    }


def model_step(problem: Problem, start: State) -> Step:
    """The model's step, measured on up to four samples at the start."""
    rows = torch.arange(min(4, len(start.x)))
    return newton_step(problem.select(rows), tree.select(start, rows))


def measure(point: Point, *, budget: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each method: tuned on one batch, run on the other to 1.2 times the best known cost."""
    goal = SHARE * best_known(*point.tuning, budget)
    chosen: dict[str, Method] = {}
    settings = methods(*point.measured)
    for name, tried in methods(*point.tuning).items():
        best = compare.tune(tried, *point.tuning, target=goal, steps=budget) if len(tried) > 1 else next(iter(tried))
        chosen[name] = settings[name][best]
    problem, start = point.measured
    target = SHARE * best_known(problem, start, budget)
    found, prices = compare.compare(
        chosen, problem, start, targets={str(SHARE): target}, budgets=dict.fromkeys(chosen, budget), repeats=repeats
    )
    peaks = {
        name: peak_bytes(partial(method.run, problem, start, MEMORY_STEPS, None)) for name, method in chosen.items()
    }
    place = {"axis": point.axis, "value": point.value, "prices": asdict(prices)}
    return [place | row | {"peak_bytes": peaks[row["method"]]} for row in compare.as_json(found)]


def best_known(problem: Problem, start: State, budget: int) -> float:
    """Mean of each sample's lowest re-solved cost by long runs of two methods."""
    step = model_step(problem, start)
    long: list[Method] = [Joint(step), Nested(LBFGS(initial=replace(step.rule, rate=1.0)), True, 1e-3)]
    return compare.reference_cost(problem, [start], long, steps=budget)


def report(rows: list[dict[str, Any]]) -> None:
    """Medians over seeds: work of a sample and milliseconds of the batch to the target, and megabytes at the peak."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    table = []
    for place in dict.fromkeys((row["axis"], row["value"]) for row in rows):
        line = [f"{place[0]} {place[1]:g}"]
        for name in names:
            here = [row for row in rows if (row["axis"], row["value"], row["method"]) == (*place, name)]
            line.append(cell_text(here))
        table.append(line)
    show("work of a sample / ms a batch / peak MB, to 1.2 times the best known cost", ["problem", *names], table)


def cell_text(here: list[dict[str, Any]]) -> str:
    """Medians over the seeds; a dash where a seed did not reach the target."""
    peak = max(row["peak_bytes"] for row in here) / 1e6
    if not all(row["reached"] for row in here):
        return f"- / - / {peak:.1f}"
    work, seconds = (statistics.median(row[key] for row in here) for key in ("work", "seconds"))
    return f"{work:.0f} / {1e3 * seconds:.0f} / {peak:.1f}"


if __name__ == "__main__":
    main()
