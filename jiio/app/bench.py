"""`jiio bench`: work and time of every method to the same re-solved costs, on trained models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jiio.app import compare
from jiio.app.methods import Method
from jiio.app.progress import Stage
from jiio.fixed_point import CHECK_EVERY
from jiio.input_memory import InputMemory
from jiio.joint import JointMap
from jiio.problem import Problem, State
from jiio.solution import Work
from jiio.solver import Picard, Solver
from jiio.step import Step

SHARES = {"1.5": 1.5, "1.2": 1.2, "1.05": 1.05}
STEPS = 120  # of a method at most
TUNING_STEPS = 60
WARM_UP = 12  # steps before the cost of one is measured
REFERENCE_STEPS = 600  # of the long runs behind a best known cost
Settings = dict[str, Method]


@dataclass(frozen=True)
class Batch:
    """A batch of one problem: where all methods start, and the model's joint step for it as a function of the rate."""

    problem: Problem
    origin: State
    step: Callable[[float], Step]


@dataclass(frozen=True)
class Case:
    """One problem on one model: a batch to tune on, a batch to measure on, a single sample for the cost of a step.

    contenders: every method on a batch, each with the settings that it chooses from on the tuning batch; "joint" has its
    default alone.  long: the long runs whose best, sample by sample, is the reference.
    """

    problem: str
    model: str
    tuning: Batch
    measured: Batch
    single: Batch
    contenders: Callable[[Batch], dict[str, Settings]]
    long: Callable[[Batch], Sequence[Method]]


def find_reference(case: Case, watch: Stage) -> dict[str, Any]:
    """What a comparison rests on: the best known `cost` of the measured batch, and the `settings` chosen for each method."""
    watch(f"{case.problem}: the best known cost, by long runs")
    return {"cost": reference_cost(case, case.measured), "settings": tuned(case, {}, watch)}


def tuned(case: Case, known: dict[str, str], watch: Stage) -> dict[str, str]:
    """`known` settings, and those of every other method, chosen on the tuning batch with the same budget for each."""
    settings, goal = dict(known), None
    for name, found in case.contenders(case.tuning).items():
        if name in settings:
            continue
        if len(found) == 1:
            settings[name] = next(iter(found))
            continue
        if goal is None:
            goal = share_of(reference_cost(case, case.tuning, steps=REFERENCE_STEPS // 6), 1.2)
        watch(f"{case.problem}: tuning {name}")
        settings[name] = compare.tune(found, case.tuning.problem, case.tuning.origin, target=goal, steps=TUNING_STEPS)
    return settings


def run_case(case: Case, *, reference: dict[str, Any], repeats: int, watch: Stage) -> dict[str, Any]:
    """Rows of every method to every target, work and time over those of the joint solve, and the cost of a joint step."""
    cost, settings = reference["cost"], tuned(case, reference["settings"], watch)
    methods = {name: found[settings[name]] for name, found in case.contenders(case.measured).items()}
    watch(f"{case.problem}: comparing {len(methods)} methods")
    targets = {key: share_of(cost, share) for key, share in SHARES.items()}
    rows, prices = compare.compare(
        methods, case.measured.problem, case.measured.origin, targets=targets,
        budgets=dict.fromkeys(methods, STEPS), repeats=repeats,
    )  # fmt: skip
    share = {target: key for key, target in targets.items()}
    named = [
        {"problem": case.problem, "model": case.model, "share": share[row["target"]]} | row
        for row in compare.as_json(rows)
    ]
    return {
        "problem": case.problem,
        "model": case.model,
        "reference_cost": cost,
        "rows": named,
        "settings": settings,
        "summary": summary(named),
        "prices": {"f": prices.f, "vjp": prices.vjp, "cost_grad": prices.cost_grad},
        "step_cost": {str(len(b.origin.x)): step_cost(b) for b in (case.single, case.measured)},
    }


def share_of(reference: float, share: float) -> float:
    """The target at `share` times the reference; of a loss that is maximised, whose cost is negative, the `share`-th part.

    >>> share_of(2.0, 1.5), share_of(-3.0, 1.5)
    (3.0, -2.0)
    """
    return reference * share if reference >= 0 else reference / share


def reference_cost(case: Case, batch: Batch, *, steps: int | None = None) -> float:
    """The best known mean cost: each sample's best of long runs of several methods."""
    return compare.reference_cost(batch.problem, [batch.origin], list(case.long(batch)), steps=steps or REFERENCE_STEPS)


def summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ratios baseline / joint at the hardest target that both reach; None where there is none."""
    found: dict[str, float | None] = {}
    for kind in ("cold", "warm"):
        for unit in ("seconds", "work"):
            found[f"{kind}_{unit}_ratio"] = None
            for share in SHARES:  # the last one that counts is the hardest
                at = {row["method"]: row[unit] for row in rows if row["share"] == share and row["reached"]}
                others = [at[name] for name in at if name.startswith(f"nested {kind}")]
                if "joint" in at and others:
                    found[f"{kind}_{unit}_ratio"] = min(others) / at["joint"]
    return found


def step_cost(batch: Batch, *, solver: Solver = Picard(), compiled: bool = False, repeats: int = 21) -> float:
    """Median time of a joint step over that of a bare forward, VJP of f and cost gradient, interleaved; a solve measures
    residuals at one of `CHECK_EVERY` steps, and so does this, once a memory of up to `WARM_UP` is full."""
    step, s = batch.step(0.3), batch.origin
    ones, memory = s.x.new_ones(len(s.x)), InputMemory.fresh(step.rule, s.x)
    F = JointMap(batch.problem, step, ones, Work(), 1e-3, memory, math.inf, compiled)
    k, kept = 0, solver.init(s)

    def steps() -> None:
        nonlocal s, k, kept
        for _ in range(CHECK_EVERY):
            fs = F.advance(s, k) if k % CHECK_EVERY else F.evaluate(s, k).next
            s, kept = solver.step(kept, k, s, fs)
            k += 1

    while k < WARM_UP:
        steps()
    joint, bare = [], []
    for _ in range(repeats):
        began = compare.clock()
        steps()
        middle = compare.clock()
        for _ in range(CHECK_EVERY):
            compare.bare_step(batch.problem, s)
        joint.append(middle - began)
        bare.append(compare.clock() - middle)
    return statistics.median(joint) / statistics.median(bare)
