"""How much work and time does each method need to reconstruct test images to a given re-solved cost?

    python benchmarks/reconstruction.py --run digits-generator --json figures.json

Rules: docs/measuring.md. Targets are 1.5, 1.2 and 1.05 times the reference cost, the best that long runs of several
methods from two starts find (computed in this run, or read from benchmarks/reference.json where it is committed).
Every method chooses among the same number of settings on a batch of training images.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import jiio
from jiio import LBFGS, Adam, Anderson, Matrix, Scalar, Step
from jiio.app import compare, methods
from jiio.app.table import show
from jiio.curvature import gauss_newton, inverse_of
from jiio.data import load_images
from jiio.joint import InputMemory, JointMap
from jiio.load import find_run, read_config
from jiio.problem import Problem, State
from jiio.solution import Work
from jiio.tasks.generation import SOLVER, reconstruction, reconstruction_step
from jiio.tasks.latent_model import solve_equilibrium, start

BATCH = 64
SHARES = {"1.5": 1.5, "1.2": 1.2, "1.05": 1.05}
REFERENCE = Path(__file__).with_name("reference.json")


def candidates(model: Any, average: torch.Tensor, prior: float) -> dict[str, dict[str, methods.Method]]:
    """Five settings of every method."""

    def joint(rate: float) -> Step:
        return reconstruction_step(model, BATCH, prior=prior, rate=rate)

    largest = float(torch.linalg.eigvalsh(torch.linalg.inv(average))[-1])
    rates = (0.1, 0.2, 0.3, 0.4, 0.6)
    adam = (0.05, 0.1, 0.2, 0.4, 0.8)
    tolerances = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
    first = Matrix(average, 1.0)
    return {
        "joint": {f"rate {r}": methods.Joint(joint(r), SOLVER) for r in rates},
        "joint, Picard": {f"rate {r}": methods.Joint(joint(r)) for r in rates},
        "joint, one average matrix": {f"rate {r}": methods.Joint(Step(Matrix(average, r))) for r in rates},
        "joint, plain steps": {f"rate {r}": methods.Joint(Step(Scalar(r, 1 / largest))) for r in rates},
        "joint, Anderson": {f"rate {r}": methods.Joint(joint(r), Anderson(10)) for r in (0.03, 0.05, 0.1, 0.2, 0.3)},
        "nested cold Adam": {f"rate {r}": methods.Nested(Adam(r), warm=False) for r in adam},
        "nested warm Adam": {f"rate {r}": methods.Nested(Adam(r), warm=True, solve_tol=3e-2) for r in adam},
        "nested warm L-BFGS": {f"tol {t}": methods.Nested(LBFGS(), warm=True, solve_tol=t) for t in tolerances},
        "nested warm L-BFGS, matrix": {
            f"tol {t}": methods.Nested(LBFGS(initial=first), warm=True, solve_tol=t) for t in tolerances
        },
    }


BUDGETS = {"joint, plain steps": 300, "nested cold Adam": 150, "nested warm Adam": 200}


def step_cost(problem: Problem, step: Step, state: State, repeats: int = 21) -> float:
    """Median time of a joint step over that of a bare forward, VJP and cost gradient."""
    work = Work()
    F = JointMap(
        problem, step, torch.ones(len(state.x)), work, 1e-3, InputMemory.fresh(step.rule, state.x), cut_steps=math.inf
    )
    s: Any = state
    for k in range(3):
        s = F.evaluate(s, k).next
    joint, bare = [], []
    for k in range(repeats):
        began = time.perf_counter()
        F.evaluate(s, k)
        middle = time.perf_counter()
        compare.bare_step(problem, s)
        joint.append(middle - began)
        bare.append(time.perf_counter() - middle)
    return statistics.median(joint) / statistics.median(bare)


def run(name: str, data_dir: str | None, repeats: int) -> dict[str, Any]:
    """All rows for one model."""
    model, config = jiio.load(name), read_config(find_run(name))
    prior = config["training"]["prior"]
    data = config["data"]
    train, test = (load_images(data, split, root=data_dir) for split in ("train", "test"))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:BATCH]
    with torch.no_grad():
        tuning, problem = (reconstruction(model, images, prior=prior) for images in (train[:BATCH], test[order]))
    origin = start(model, BATCH)
    guess = model.guess(train[:BATCH])
    average = inverse_of(gauss_newton(tuning, solve_equilibrium(model, guess), guess).mean(0))
    methods = candidates(model, average, prior)
    starts = [origin, start(model, BATCH, latent=model.guess(test[order]))]
    long = [methods["joint"]["rate 0.1"], methods["nested warm L-BFGS, matrix"]["tol 0.001"]]
    reference = known_reference(name) or compare.reference_cost(problem, starts, long, steps=600)
    goal = 1.2 * compare.reference_cost(tuning, [start(model, BATCH)], long[:1], steps=200)
    chosen, budgets = {}, {}
    for method, settings in methods.items():
        budgets[method] = BUDGETS.get(method, 150)
        best = compare.tune(settings, tuning, origin, target=goal, steps=budgets[method] // 2)
        chosen[f"{method} ({best})"] = settings[best]
        budgets[f"{method} ({best})"] = budgets.pop(method)
    targets = {key: share * reference for key, share in SHARES.items()}
    rows, prices = compare.compare(chosen, problem, origin, targets=targets, budgets=budgets, repeats=repeats)
    ratio = step_cost(problem, reconstruction_step(model, BATCH, prior=prior), origin)
    return {
        "model": name,
        "reference_cost": reference,
        "rows": [row | {"problem": "reconstruction", "model": name} for row in compare.as_json(rows)],
        "prices": {"f": prices.f, "vjp": prices.vjp, "cost_grad": prices.cost_grad},
        "step_cost": {"reconstruction": {str(BATCH): ratio}},
    }


def known_reference(name: str) -> float | None:
    """The committed reference cost of a packaged model."""
    return json.loads(REFERENCE.read_text()).get(name) if REFERENCE.exists() else None


def print_rows(result: dict[str, Any]) -> None:
    """One line a method, steps, work and seconds to each target."""
    names = list(dict.fromkeys(row["method"] for row in result["rows"]))
    lines = []
    for name in names:
        rows = [row for row in result["rows"] if row["method"] == name]
        cells = [
            f"{row['steps']} / {row['work']:.0f} / {row['seconds']:.2f}" if row["reached"] else "not reached"
            for row in rows
        ]
        lines.append([name, *cells])
    header = ("method", *(f"{share} x reference" for share in SHARES))
    note = "steps / work a sample in evaluations of f / seconds for the batch of 64"
    show(f"{result['model']}: reference cost {result['reference_cost']:.4f}", header, lines, note=note)
    print(f"one joint step costs {result['step_cost']['reconstruction'][str(BATCH)]:.2f} bare steps (batch {BATCH})")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", help="run folder or packaged model; digits-generator by default")
    parser.add_argument("--data-dir")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [run(name, options.data_dir, options.repeats) for name in options.run or ["digits-generator"]]
    for result in results:
        print_rows(result)
    if options.json:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        options.json.write_text(json.dumps(machine | {"threads": options.threads, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
