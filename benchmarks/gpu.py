"""What a joint step, a solve and a training step take on a GPU, evaluated as usual and replayed from CUDA graphs.

    python benchmarks/gpu.py --json gpu.json

Models: those of the package, and fresh ones of the full presets for 32x32 and 64x64 colour images. Medians of interleaved
repeats, the clock read when the GPU has done what it was given.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jiio import Anderson, Problem, State, load
from jiio.app.compare import bare_step, clock
from jiio.app.team import Team
from jiio.app.train_generation import Trainer, Training, default_config
from jiio.cuda_graph import captured
from jiio.fixed_point import CHECK_EVERY
from jiio.input_memory import InputMemory
from jiio.joint import JointMap
from jiio.models import Generator, generator
from jiio.solution import Work
from jiio.solver import Picard, Solver
from jiio.tasks import generation
from jiio.tasks.generation import reconstruct, reconstruction, reconstruction_step
from jiio.tasks.image_rule import refit_tangent
from jiio.tasks.latent_model import start

STEPS = 12  # of a timed run


def models() -> Iterator[tuple[str, Generator, torch.Tensor]]:
    """(name, model, images of its shape) with made-up images where the model is fresh."""
    for name in ("digits-generator", "mnist-generator"):
        model = load(name, device="cuda")
        assert isinstance(model, Generator)
        with torch.no_grad():
            x = torch.randn(512, model.config.latent, generator=torch.Generator().manual_seed(0)).cuda()
            images = model.readout(model.equilibrium.cell()(model.start(x), x)).clamp(0, 1)
        yield name, model, images
    for side in (32, 64):
        torch.manual_seed(0)
        model = generator(default_config((3, side, side), preset="full")).cuda()
        images = torch.rand(512, 3, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
        images = torch.nn.functional.interpolate(images, size=side, mode="bicubic").clamp(0, 1)
        refit_tangent(model, torch.randn(4, model.config.latent).cuda())
        yield f"full {side}x{side}", model, images


def steps_of(problem: Problem, model: Generator, first: State, solver: Solver) -> Callable[[], None]:
    """A run of joint steps as a solve takes them."""
    step = reconstruction_step(model, len(first.x))

    def run() -> None:
        ones = first.x.new_ones(len(first.x))
        memory = InputMemory.fresh(step.rule, first.x)
        F = JointMap(problem, step, ones, Work(), 1e-3, memory, cut_steps=math.inf)
        s, kept = first, solver.init(first)
        for k in range(STEPS):
            fs = F.evaluate(s, k).next if k % CHECK_EVERY == 0 else F.advance(s, k)
            s, kept = solver.step(kept, k, s, fs)

    return run


def bare(problem: Problem, first: State) -> Callable[[], None]:
    """As many bare evaluations of f, its VJP and the gradient of the cost."""

    def run() -> None:
        for _ in range(STEPS):
            bare_step(problem, first)

    return run


def gradients(problem: Problem, first: State) -> Callable[[], None]:
    """As many evaluations of the problem's gradients, which a captured one replays: a bare step without launches."""

    def run() -> None:
        for _ in range(STEPS):
            problem.sweep(first)

    return run


def milliseconds(runs: dict[str, Callable[[], object]], *, repeats: int = 7) -> dict[str, float]:
    """Median of each run in turn, after two runs that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return {name: 1e3 * statistics.median(values[2:]) for name, values in seconds.items()}


@contextmanager
def precision(*, tf32: bool) -> Iterator[None]:
    """Convolutions in TF32, torch's default, or in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def step_times(model: Generator, images: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a step, by what is done in it."""
    first = start(model, len(images))
    first = first._replace(mu=tuple(torch.randn_like(part) for part in first.z))
    with torch.no_grad():
        problem = reconstruction(model, images)
        graph = captured(problem)
    found = milliseconds(
        {
            "bare": bare(problem, first),
            "joint": steps_of(problem, model, first, Picard()),
            "bare, graph": gradients(graph, first),
            "joint, graph": steps_of(graph, model, first, Picard()),
            "Anderson(10), graph": steps_of(graph, model, first, Anderson(10)),
        }
    )
    return {name: value / STEPS for name, value in found.items()}


@contextmanager
def uncaptured() -> Iterator[None]:
    """Solves of the generation task without graphs."""
    kept = generation.captured
    generation.captured = lambda problem: problem
    try:
        yield
    finally:
        generation.captured = kept


def without_graphs(run: Callable[[], object]) -> Callable[[], object]:
    """The same run, evaluated as usual."""

    def plain() -> object:
        with uncaptured():
            return run()

    return plain


def solve_times(model: Generator, images: torch.Tensor) -> dict[str, float]:
    """Milliseconds of 60 joint steps of a whole batch."""

    def run() -> object:
        return reconstruct(model, images, max_steps=60, on_failure="ignore")

    return milliseconds({"solve": without_graphs(run), "solve, graph": run}, repeats=5)


def training_times(side: int, preset: Any, images: torch.Tensor) -> dict[str, float]:
    """Milliseconds of an optimiser step of 64 images."""
    runs: dict[str, Callable[[], object]] = {}
    for chosen in ("32", "bf16"):
        training = Training(images=512, steps=10_000, precision=chosen)
        config = default_config((images.shape[1], side, side), preset=preset)
        trainer = Trainer(images.cpu(), config, training, team=Team("cuda"))
        runs[f"{chosen}, graph"] = trainer.advance
        runs[chosen] = without_graphs(trainer.advance)
    return milliseconds(runs, repeats=5)


def main() -> None:
    """Print a line for every measurement; write all to --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 512])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device on this machine")
    rows: list[dict[str, Any]] = []
    for name, model, images in models():
        for batch in options.batches:
            for tf32 in (True, False):
                with precision(tf32=tf32):
                    rows.append({"model": name, "batch": batch, "tf32": tf32} | step_times(model, images[:batch]))
                report(rows[-1])
        with precision(tf32=True):
            rows.append({"model": name, "batch": 64} | solve_times(model, images[:64]))
            report(rows[-1])
    for side, preset in ((28, "small"), (32, "small"), (32, "full"), (64, "full")):
        images = torch.rand(512, 1 if side == 28 else 3, side, side)
        rows.append({"training": f"{preset} {side}x{side}", "batch": 64} | training_times(side, preset, images))
        report(rows[-1])
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": 0, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1))


def report(row: dict[str, Any]) -> None:
    """A line."""
    print(
        "  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )


if __name__ == "__main__":
    main()
