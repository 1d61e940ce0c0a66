"""`jiio evaluate RUN` for a classifier: clean and robust accuracy, the project's attacks and other people's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from jiio.app.progress import Count
from jiio.app.restore import device_of
from jiio.app.table import console, show
from jiio.models import Classifier
from jiio.solution import Work
from jiio.tasks.attack import JointAttack, Method, PGDAttack, attack
from jiio.tasks.threat import Threat

BATCH = 250
RESTARTS = 5
EVALUATION_TOL = 1e-3  # of z and adjoint while other people's attacks run; `jiio audit` sweeps it
OWN: dict[str, Method] = {
    "joint": JointAttack(),
    "joint, margin": JointAttack(loss="margin", mirror=math.inf),
    "joint, 5 restarts": JointAttack(restarts=RESTARTS, mirror=-math.inf),
    "PGD-100, cold solves": PGDAttack(steps=100),
}


@dataclass(frozen=True)
class Result:
    """One attack on all images: whether each is still classified right, its time, work, and median distance of those
    attacks that look for the nearest wrong input."""

    robust: Tensor
    seconds: float
    work: Work | None = None
    distance: float | None = None


def attack_names(threat: Threat) -> list[str]:
    """All attacks of an evaluation on this machine."""
    return [
        *OWN,
        *(_foolbox(threat) if find_spec("foolbox") else {}),
        *(["AutoAttack"] if find_spec("autoattack") else []),
    ]


def evaluate(
    model: Classifier, images: Tensor, labels: Tensor, threat: Threat, *, watch: Count | None = None
) -> dict[str, Any]:
    """{clean, robust by attack: {accuracy, low, high, seconds, work}, strongest}; `watch` is told of every image done.

    work: f, vjp and cost_grad a sample of the project's own attacks; other people's are timed alone.
    """
    right = clean(model, images, labels)
    results = dict(_results(model, images, labels, threat, watch))
    rows = {name: _row(right & result.robust, result, len(images)) for name, result in results.items()}
    strongest = right.clone()
    for result in results.values():
        strongest &= result.robust
    return {
        "images": len(images),
        "threat": {"norm": threat.norm, "radius": threat.radius},
        "clean": wilson(right),
        "attacks": rows,
        "strongest": wilson(strongest),
    }


def clean(model: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified right, (images,), a batch at a time on the model's device."""
    model.tol = EVALUATION_TOL
    device = device_of(model)
    with torch.no_grad():
        parts = [model(x.to(device)).argmax(1) == y.to(device) for x, y in _batches(images, labels)]
    return torch.cat(parts)


def _results(
    model: Classifier, images: Tensor, labels: Tensor, threat: Threat, watch: Count | None
) -> Iterator[tuple[str, Result]]:
    def told(count: int) -> None:
        if watch:
            watch(count)

    attack(model, images[:1], labels[:1], threat, JointAttack(steps=1))  # what a first call costs is no attack's time
    for name, method in OWN.items():
        yield name, _own(model, images, labels, threat, method, told)
    if find_spec("foolbox"):
        for name, make in _foolbox(threat).items():
            yield name, _others(model, images, labels, threat, make(), told)
    if find_spec("autoattack"):
        yield "AutoAttack", _autoattack(model, images, labels, threat, told)


def _own(model: Classifier, images: Tensor, labels: Tensor, threat: Threat, method: Method, watch: Count) -> Result:
    robust, work, began = [], Work(), time.perf_counter()
    for x, y in _batches(images, labels):
        found = attack(model, x, y, threat, method)
        robust.append(found.robust)
        work.include(found.work)
        watch(len(x))
    return Result(torch.cat(robust), time.perf_counter() - began, work)


def _foolbox(threat: Threat) -> dict[str, Callable[[], Any]]:
    """foolbox's attacks for the threat's norm, as {name: constructor}."""
    attacks: Any = import_module("foolbox.attacks")
    if threat.norm == "linf":
        return {
            "foolbox PGD, 5 restarts": lambda: attacks.LinfPGD(steps=40).repeat(RESTARTS),
            "foolbox DeepFool": lambda: attacks.LinfDeepFoolAttack(steps=50),
            "foolbox FMN": lambda: attacks.LInfFMNAttack(steps=100),
        }
    return {
        "foolbox PGD, 5 restarts": lambda: attacks.L2PGD(steps=40).repeat(RESTARTS),
        "foolbox DeepFool": lambda: attacks.L2DeepFoolAttack(steps=50),
        "foolbox FMN": lambda: attacks.L2FMNAttack(steps=100),
    }


def _others(model: Classifier, images: Tensor, labels: Tensor, threat: Threat, method: Any, watch: Count) -> Result:
    """A foolbox attack: robust where the input that it returns within the radius is classified right."""
    foolbox: Any = import_module("foolbox")
    bounds = (threat.low, threat.high)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=bounds, device=images.device)
    robust, distances, began = [], [], time.perf_counter()
    for x, y in _batches(images, labels):
        found, _, success = method(wrapped, x, y, epsilons=[threat.radius])
        robust.append(~success[0])
        offset = (found[0] - x).flatten(1)
        size = offset.abs().amax(1) if threat.norm == "linf" else offset.norm(dim=1)
        distances.append(size)
        watch(len(x))
    nearest = not hasattr(method, "times")  # PGD repeated goes to the full radius always
    distance = float(torch.cat(distances).median()) if nearest else None
    return Result(torch.cat(robust), time.perf_counter() - began, distance=distance)


def _autoattack(model: Classifier, images: Tensor, labels: Tensor, threat: Threat, watch: Count) -> Result:
    autoattack: Any = import_module("autoattack")
    norm = "L2" if threat.norm == "l2" else "Linf"
    adversary = autoattack.AutoAttack(model, norm=norm, eps=threat.radius, version="standard", verbose=False)
    began = time.perf_counter()
    found = adversary.run_standard_evaluation(images, labels, bs=BATCH)
    with torch.no_grad():
        robust = torch.cat([model(x).argmax(1) == y for x, y in _batches(found, labels)])
    watch(len(images))
    return Result(robust, time.perf_counter() - began)


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(images.split(BATCH), labels.split(BATCH), strict=True)


def _row(robust: Tensor, result: Result, count: int) -> dict[str, Any]:
    work = None if result.work is None else result.work.each(count)
    return wilson(robust) | {"seconds": result.seconds, "work": work, "median_distance": result.distance}


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

    lines = [["clean", percent(report["clean"]), "", "", ""]]
    if "clean_all" in report:
        whole = report["clean_all"]
        lines.insert(0, [f"clean, all {whole['images']} images", percent(whole), "", "", ""])
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
    if not find_spec("foolbox"):
        console.print("attacks of others were left out: pip install 'jiio[attacks]'")
