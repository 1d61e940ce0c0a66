"""`jiio evaluate RUN` for a meta-trained classifier: accuracy on new tasks, beside the same model without adaptation."""

from __future__ import annotations

import time
from typing import Any

import torch

from jiio.app.progress import Count
from jiio.app.table import show, with_interval
from jiio.data.episodes import Episodes
from jiio.models import ContextClassifier
from jiio.optimizer import Adam
from jiio.tasks.meta import PRIOR, Episode, MetaLoss
from jiio.tasks.metrics import interval
from jiio.tasks.unrolled import UnrolledLoss

TASKS = 10  # at a time
QUERIES = 5
STEPS = 100
NESTED_TASKS = 50  # of the baseline, ten times as dear, whose vectors and hence answers are the same
METHODS = ("joint", "nested", "unrolled", "prototypes")
SETTINGS = ((5, 1), (5, 5), (20, 1))


def evaluate(
    model: ContextClassifier, images: torch.Tensor, *, tasks: int, prior: float = PRIOR, seed: int = 0,
    watch: Count | None = None,
) -> dict[str, Any]:  # fmt: skip
    """{"5way-1shot": {joint, nested, unrolled, prototypes: {accuracy: {mean, low, high}, ...}}, ...} on tasks from `images`
    (characters, drawings, ...); `watch` is told of every task done (`evaluated_tasks` in all)."""
    report: dict[str, Any] = {"tasks": tasks}
    methods: dict[str, MetaLoss | UnrolledLoss] = {
        "joint": MetaLoss(model, gradient="first_order", prior=prior, steps=STEPS),
        "nested": MetaLoss(model, gradient="first_order", prior=prior, steps=40, optimizer=Adam(0.1)),
        "unrolled": UnrolledLoss(model, prior=prior),
        "prototypes": MetaLoss(model, gradient="first_order", prior=prior, steps=0),
    }
    for ways, shots in settings(len(images)):
        episodes = Episodes(images, ways, shots, QUERIES, seed=seed)
        report[f"{ways}way-{shots}shot"] = {
            name: _accuracy(loss, episodes, _tasks(name, tasks), watch) for name, loss in methods.items()
        }
    return report


def settings(classes: int) -> list[tuple[int, int]]:
    """Ways and shots of the tasks that so many classes allow."""
    return [(ways, shots) for ways, shots in SETTINGS if ways <= classes]


def evaluated_tasks(tasks: int, classes: int) -> int:
    """How many adaptations `evaluate` does."""
    return sum(_tasks(name, tasks) for name in METHODS) * len(settings(classes))


def _tasks(method: str, tasks: int) -> int:
    return min(tasks, NESTED_TASKS) if method == "nested" else tasks


def _accuracy(loss: MetaLoss | UnrolledLoss, episodes: Episodes, tasks: int, watch: Count | None) -> dict[str, Any]:
    right: list[float] = []
    converged, support, seconds, work = 0, 0.0, 0.0, 0
    for first in range(0, tasks, TASKS):
        count = min(TASKS, tasks - first)
        drawn = (part.to(episodes.images.device) for part in episodes.draw(first, count))
        episode = Episode(*drawn, episodes.ways)  # pyright: ignore[reportCallIssue]
        began = time.perf_counter()
        with torch.no_grad():
            _, logits, solution = loss(episode)
        seconds += time.perf_counter() - began
        right += (logits.argmax(2) == episode.query_labels).float().mean(1).tolist()
        converged += int(solution.converged.sum())
        support += float(solution.cost.sum())
        work += solution.work.f + solution.work.vjp
        if watch:
            watch(count)
    return {
        "tasks": tasks,
        "accuracy": interval(right),
        "support_objective": support / tasks,
        "converged": converged / tasks,
        "evaluations": work / tasks,
        "seconds": seconds,
    }


def show_report(report: dict[str, Any]) -> None:
    """A column for each kind of task."""
    kinds = [name for name in report if "shot" in name]
    rows = [report[kind] for kind in kinds]

    def accuracy(method: str, row: dict[str, Any]) -> str:
        return with_interval({key: 100 * value for key, value in row[method]["accuracy"].items()})

    lines = [[method, *(accuracy(method, row) for row in rows)] for method in METHODS]
    lines.append(["converged, joint", *(f"{100 * row['joint']['converged']:.1f}" for row in rows)])
    lines += [
        [f"f + VJPs, {method}", *(f"{row[method]['evaluations']:.0f}" for row in rows)]
        for method in ("joint", "nested")
    ]
    show(
        f"Accuracy in % on {report['tasks']} new tasks",
        ("", *kinds),
        lines,
        note=f"prototypes: the same model without adaptation; nested: Adam, cold solves, {NESTED_TASKS} of the tasks at most; "
        "unrolled: five plain gradient steps, as in MAML; converged: in %; f + VJPs: evaluations of one task's adaptation",
    )
