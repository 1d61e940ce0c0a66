"""What a joint step costs over a bare forward and vector-Jacobian product of f and gradient of the cost.

    python benchmarks/step_cost.py digits-generator mnist-generator --data-dir DATA --json step_cost.json

As it is, mixed with a memory of ten, and compiled (`solve(compiled=True)`); each of a single sample and of a batch, the ratios
of medians of interleaved runs on one thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from jiio.app.bench import step_cost
from jiio.app.commands_bench import Bench, cases
from jiio.solver import Anderson, Picard

DIGITS = ["digits-generator", "digits-classifier", "digits-5way1shot"]
KINDS = {"plain": (Picard(), False), "Anderson(10)": (Anderson(10), False), "compiled": (Picard(), True)}


def main() -> None:
    """Print a row for every problem and batch; write them where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=DIGITS, help="packaged models or runs")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'model':20}{'problem':16}{'batch':>6}" + "".join(f"{kind:>14}" for kind in KINDS))
    for model in options.models:
        for case in cases(model, Bench(data_dir=options.data_dir)):
            for batch in (case.single, case.measured):
                size = len(batch.origin.x)
                found = {k: step_cost(batch, solver=s, compiled=c, repeats=41) for k, (s, c) in KINDS.items()}
                rows.append({"model": model, "problem": case.problem, "batch": size} | found)
                ratios = "".join(f"{ratio:14.2f}" for ratio in found.values())
                print(f"{model:20}{case.problem:16}{size:6}{ratios}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
