"""`jiio evaluate RUN` for a classifier: clean and robust accuracy, the project's attacks and other people's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from jiio.app.progress import Count
from jiio.app.table import console, show
from jiio.load import device_of
from jiio.models import Classifier
from jiio.solution import Work
from jiio.tasks.attack import RESOLVE_TOL, RIVALS, JointAttack, Method, PGDAttack, attack
from jiio.tasks.threat import Threat

BATCH = 250
RESTARTS = 5
EVALUATION_TOL = 1e-3  # of z and adjoint while other people's attacks run; `jiio audit` sweeps it
OWN: dict[str, Method] = {
    "joint": JointAttack(),
    "joint, margins": JointAttack(loss="margin", mirror=math.inf, rivals=RIVALS),
    "joint, 5 restarts": JointAttack(restarts=RESTARTS, mirror=-math.inf),
    "PGD-100, cold solves": PGDAttack(steps=100),
}


@dataclass(frozen=True)
class Result:
    """One attack on all images: whether each is still classified right, its time, work, whether the equilibria that this
    rests on were solved to 1e-4 (of the project's own), and median distance of those attacks that look for the nearest wrong
    input (inf where they found none for most images)."""

    robust: Tensor
    seconds: float
    work: Work | None = None
    resolved: Tensor | None = None
    distance: float | None = None


Run = Callable[[Tensor, Tensor, Count], Result]  # of images and their labels


def evaluate(
    model: Classifier, images: Tensor, labels: Tensor, threat: Threat, *, rows: Tensor | None = None,
    seed: int = 0, watch: Count = lambda images: None,
) -> dict[str, Any]:  # fmt: skip
    """{clean_all, clean, attacks by name: {accuracy, low, high, seconds, work, resolved, median_distance}, strongest} of the
    images `rows` (all otherwise), clean_all of all of them: attacks are dear and clean answers cheap, and a few hundred
    images can be a whole point off. `watch` is told of every attacked image.

    work: f, vjp and cost_grad a sample of the project's own attacks; other people's are timed alone. resolved: share of the
    images all of whose equilibria could be solved, of the project's own attacks.
    """
    with solved_to(model, EVALUATION_TOL):
        every = _right(model, images, labels)
        rows = torch.arange(len(images)) if rows is None else rows
        device = device_of(model)
        right, images, labels = every[rows], images[rows].to(device), labels[rows].to(device)
        # what a first call costs is no attack's time
        attack(model, images[:1], labels[:1], threat, JointAttack(steps=1))
        results: dict[str, Result] = {}
        for name, run in attacks(model, threat).items():
            torch.manual_seed(seed)  # other people's attacks draw from torch's global state
            results[name] = run(images, labels, watch)
    return {
        "images": len(images),
        "threat": {"norm": threat.norm, "radius": threat.radius},
        "clean_all": wilson(every) | {"images": len(every)},
        "clean": wilson(right),
        "attacks": {name: _row(right & result.robust, result) for name, result in results.items()},
        "strongest": wilson(torch.stack([right, *(result.robust for result in results.values())]).all(0)),
    }


@contextmanager
def solved_to(model: Classifier, tol: float) -> Iterator[None]:
    """Within, the model's equilibria and adjoints are solved to `tol` and do not warn, as hundreds of solves would of what a
    report has as one figure; afterwards it is what it was."""
    before = model.tol, model.on_failure
    model.tol, model.on_failure = tol, "ignore"
    try:
        yield
    finally:
        model.tol, model.on_failure = before


def attacks(model: Classifier, threat: Threat) -> dict[str, Run]:
    """All attacks of an evaluation on this machine, by name."""
    found: dict[str, Run] = {name: partial(_own, model, threat, method) for name, method in OWN.items()}
    if find_spec("foolbox"):
        found |= {name: partial(_others, model, threat, method) for name, method in _foolbox(threat).items()}
    if find_spec("autoattack"):
        found["AutoAttack"] = partial(_autoattack, model, threat)
    return found


def _right(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified right, (images,), a batch at a time on the model's device."""
    device = device_of(model)
    with torch.no_grad():
        return torch.cat([model(x.to(device)).argmax(1) == y.to(device) for x, y in _batches(images, labels)])


def _own(model: Classifier, threat: Threat, method: Method, images: Tensor, labels: Tensor, watch: Count) -> Result:
    robust, resolved, work, began = [], [], Work(), time.perf_counter()
    for x, y in _batches(images, labels):
        found = attack(model, x, y, threat, method)
        robust.append(found.robust)
        resolved.append(found.resolved)
        work.include(found.work)
        watch(len(x))
    return Result(torch.cat(robust), time.perf_counter() - began, work, torch.cat(resolved))


def _foolbox(threat: Threat) -> dict[str, Any]:
    """foolbox's attacks for the threat's norm, by name."""
    attacks: Any = import_module("foolbox.attacks")
    if threat.norm == "linf":
        return {
            "foolbox PGD, 5 restarts": attacks.LinfPGD(steps=40).repeat(RESTARTS),
            "foolbox DeepFool": attacks.LinfDeepFoolAttack(steps=50),
            "foolbox FMN": attacks.LInfFMNAttack(steps=100),
        }
    return {
        "foolbox PGD, 5 restarts": attacks.L2PGD(steps=40).repeat(RESTARTS),
        "foolbox DeepFool": attacks.L2DeepFoolAttack(steps=50),
        "foolbox FMN": attacks.L2FMNAttack(steps=100),
    }


def _others(model: Classifier, threat: Threat, method: Any, images: Tensor, labels: Tensor, watch: Count) -> Result:
    """A foolbox attack: robust where the input that it returns within the radius is classified right."""
    foolbox: Any = import_module("foolbox")
    bounds = (threat.low, threat.high)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=bounds, device=images.device)
    nearest = not hasattr(method, "times")  # PGD repeated goes to the full radius always
    robust, distances, began = [], [], time.perf_counter()
    for x, y in _batches(images, labels):
        found, _, success = method(wrapped, x, y, epsilons=[threat.radius, None] if nearest else [threat.radius])
        robust.append(~success[0])
        if nearest:
            offset = (found[0] - x).flatten(1)
            size = offset.abs().amax(1) if threat.norm == "linf" else offset.norm(dim=1)
            # an image that was never fooled comes back as it was: not at distance 0 but at none
            distances.append(size.masked_fill(~success[1], math.inf))
        watch(len(x))
    distance = float(torch.cat(distances).median()) if nearest else None
    return Result(torch.cat(robust), time.perf_counter() - began, distance=distance)


def _autoattack(model: Classifier, threat: Threat, images: Tensor, labels: Tensor, watch: Count) -> Result:
    autoattack: Any = import_module("autoattack")
    norm = "L2" if threat.norm == "l2" else "Linf"
    # by itself it runs on CUDA, on a machine without too, and seeds itself by the clock
    adversary = autoattack.AutoAttack(
        model, norm=norm, eps=threat.radius, seed=torch.initial_seed(), version="standard", verbose=False,
        device=images.device,
    )  # fmt: skip
    began = time.perf_counter()
    found = adversary.run_standard_evaluation(images, labels, bs=BATCH)
    robust = _right(model, found, labels)
    watch(len(images))
    return Result(robust, time.perf_counter() - began)


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.split(BATCH), labels.split(BATCH), strict=True)


def _row(robust: Tensor, result: Result) -> dict[str, Any]:
    work = None if result.work is None else result.work.each(len(robust))
    resolved = None if result.resolved is None else float(result.resolved.float().mean())
    return wilson(robust) | {
        "seconds": result.seconds, "work": work, "resolved": resolved, "median_distance": result.distance
    }  # fmt: skip


def wilson(right: Tensor) -> dict[str, float]:
    """Accuracy and its 95 % interval (Wilson's).

    >>> found = wilson(torch.tensor([True] * 9 + [False]))
    >>> round(found["accuracy"], 3), round(found["low"], 3), round(found["high"], 3)
    (0.9, 0.596, 0.982)
    """
    n, p, q = len(right), float(right.float().mean()), 1.959964
    centre = (p + q * q / (2 * n)) / (1 + q * q / n)
    half = q / (1 + q * q / n) * math.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    return {"accuracy": p, "low": centre - half, "high": centre + half}


def show_report(report: dict[str, Any]) -> None:
    """The table of an evaluation."""

    def percent(row: dict[str, float]) -> str:
        return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"

    whole = report["clean_all"]
    lines = [
        [f"clean, all {whole['images']} images", percent(whole), "", "", ""],
        ["clean", percent(report["clean"]), "", "", ""],
    ]
    for name, row in report["attacks"].items():
        work = "" if row["work"] is None else f"{row['work']['f']:.0f} + {row['work']['vjp']:.0f}"
        distance = "" if row["median_distance"] is None else f"{row['median_distance']:.2f}"
        lines.append([name, percent(row), f"{row['seconds']:.1f}", work, distance])
    lines.append(["all of them", percent(report["strongest"]), "", "", ""])
    threat = report["threat"]
    show(
        f"{report['images']} test images, {threat['norm']} radius {threat['radius']:g}",
        ("attack", "accuracy %", "seconds", "f + VJPs", "distance"),
        lines,
        note="95 % intervals in brackets; distance: median of those attacks that look for the nearest wrong image",
    )
    least = min((row["resolved"] for row in report["attacks"].values() if row["resolved"] is not None), default=1.0)
    if least < 1:
        console.print(
            f"[yellow]equilibria of {100 * (1 - least):.1f} % of the images could not be solved to {RESOLVE_TOL:g}, or their "
            "losses are no finite numbers: what is said of them, right or wrong, says nothing of robustness[/]"
        )
    if not find_spec("foolbox"):
        console.print("attacks of others were left out: pip install 'jiio[attacks]'")
