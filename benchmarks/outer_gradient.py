"""Is the exact outer gradient of meta-learning worth its price: accuracy, error and time beside the first-order one?

Trains the same model by the same tasks with either gradient, for each seed, then measures both models on tasks of test
characters, and both gradients on both models against the exact gradient of a tightly converged adaptation.

    python benchmarks/outer_gradient.py --data-dir DATA --json outer_gradient.json
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from jiio.app.evaluate_meta import TASKS
from jiio.app.progress import Count, images_bar
from jiio.app.run_folder import write_json
from jiio.app.table import show, with_interval
from jiio.app.train_meta import Trainer, Training, make_trainer
from jiio.data import load_characters
from jiio.data.episodes import Episodes
from jiio.tasks.meta import Episode, Gradient, MetaLoss
from jiio.tasks.metrics import interval

GRADIENTS: tuple[Gradient, Gradient] = ("exact", "first_order")
PRICED = 7  # repeats of a timed step
PROBES = 2  # batches of two tasks on which gradients are compared
TIGHT = {"steps": 300, "linear_tol": 1e-4, "linear_steps": 200}


@dataclass(frozen=True)
class Options:
    """What is measured on how much."""

    data: str = "omniglot"
    """omniglot or digits."""
    data_dir: str | None = None
    """Folder of the data."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One pair of trainings each."""
    steps: int = 300
    """Optimiser steps of a training."""
    train_ways: int = 10
    """Classes of a training task."""
    ways: int = 20
    """Classes of a test task."""
    tasks: int = 200
    """Test tasks."""
    threads: int = 1
    """CPU threads."""
    json: Path | None = None
    """File for the figures."""


def main(options: Options) -> None:
    """Print the table, write the figures."""
    torch.set_num_threads(options.threads)
    test = load_characters(options.data, "test", root=options.data_dir)
    rows: list[dict[str, Any]] = []
    with images_bar("optimiser steps", total=len(options.seeds) * len(GRADIENTS) * options.steps) as done:
        for seed in options.seeds:
            rows += [measured(options, test, seed, gradient, done) for gradient in GRADIENTS]
    show_rows(options, rows)
    if options.json:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        write_json(options.json, {"options": {**vars(options), "json": str(options.json)}, "rows": rows} | versions)


def measured(options: Options, test: Tensor, seed: int, gradient: Gradient, done: Count) -> dict[str, Any]:
    """One training, and what came of it."""
    training = Training(gradient=gradient, train_ways=options.train_ways, steps=options.steps, seed=seed)
    trainer, _ = make_trainer(options.data, training, data_dir=options.data_dir)
    fresh = gradient_errors(trainer)
    seconds: list[float] = []
    for _ in range(options.steps):
        began = time.perf_counter()
        trainer.advance()
        seconds.append(time.perf_counter() - began)
        done(1)
    trainer.finish()
    return {
        "seed": seed,
        "gradient": gradient,
        "accuracy": accuracy(trainer, test, options),
        "fresh": fresh,
        "trained": gradient_errors(trainer),
        "seconds": sum(seconds),
        "price": price(trainer),
    }


def accuracy(trainer: Trainer, test: Tensor, options: Options) -> dict[str, float]:
    """Share of right answers of adapted query images of test characters."""
    loss = MetaLoss(trainer.model, gradient="first_order", steps=100)
    episodes = Episodes(test, options.ways, 1, 5, seed=0)
    right: list[float] = []
    for first in range(0, options.tasks, TASKS):
        episode = Episode(*episodes.draw(first, min(TASKS, options.tasks - first)), options.ways)  # pyright: ignore
        with torch.no_grad():
            _, logits, _ = loss(episode)
        right += (logits.argmax(2) == episode.query_labels).float().mean(1).tolist()
    return interval(right)


def gradient_errors(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Cosine to, and relative error against, the tight exact gradient, of both gradients as training takes them."""
    episodes = Episodes(trainer.episodes.images, trainer.training.train_ways, 1, 2, turned=True, seed=999)
    found: dict[str, dict[str, list[float]]] = {name: {"cosine": [], "error": []} for name in GRADIENTS}
    for number in range(PROBES):
        episode = Episode(*episodes.draw(number, 2), episodes.ways)  # pyright: ignore[reportCallIssue]
        if number == 0:
            trainer.refresh(episode)
        exact = flat_gradient(trainer, MetaLoss(trainer.model, gradient="exact", **TIGHT), episode)
        for name in GRADIENTS:
            loss = MetaLoss(trainer.model, gradient=name, steps=trainer.training.adaptation_steps)
            other = flat_gradient(trainer, loss, episode)
            found[name]["cosine"].append(float(torch.nn.functional.cosine_similarity(exact, other, dim=0)))
            found[name]["error"].append(float((exact - other).norm() / exact.norm()))
    return {name: {key: statistics.mean(parts) for key, parts in columns.items()} for name, columns in found.items()}


def price(trainer: Trainer) -> float:
    """Median time of an exact loss and its gradient over that of a first-order one, interleaved on the same tasks."""
    seconds: dict[str, list[float]] = {name: [] for name in GRADIENTS}
    for _ in range(PRICED):
        for name in GRADIENTS:
            loss = MetaLoss(trainer.model, gradient=name, steps=trainer.training.adaptation_steps)
            began = time.perf_counter()
            flat_gradient(trainer, loss, trainer.episode())
            seconds[name].append(time.perf_counter() - began)
    return statistics.median(seconds["exact"]) / statistics.median(seconds["first_order"])


def flat_gradient(trainer: Trainer, loss: MetaLoss, episode: Episode) -> Tensor:
    """The outer gradient in all parameters of the model, one vector."""
    value, _, _ = loss(episode)
    parameters = list(trainer.model.parameters())
    parts = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def show_rows(options: Options, rows: list[dict[str, Any]]) -> None:
    """A line a training."""
    lines = [
        [
            f"{row['seed']}",
            row["gradient"],
            with_interval({key: 100 * value for key, value in row["accuracy"].items()}),
            *(f"{row[when][row['gradient']][key]:.3f}" for when in ("fresh", "trained") for key in ("cosine", "error")),
            f"{row['seconds']:.0f}",
            f"{row['price']:.2f}",
        ]
        for row in rows
    ]
    show(
        f"{options.steps} steps of {options.train_ways}-way tasks; {options.tasks} {options.ways}-way 1-shot test tasks",
        ("seed", "gradient", "accuracy %", "cosine, fresh", "error, fresh", "cosine", "error", "seconds", "price"),
        lines,
        note="cosine and relative error against the exact gradient of a converged adaptation; fresh: before training; "
        "price: time of an exact step over that of a first-order one",
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
