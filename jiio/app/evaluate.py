"""`jiio evaluate RUN`: reconstruction and restoration of test images, beside the linear baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jiio.models import Generator
from jiio.problem import State
from jiio.solution import Solution
from jiio.tasks.generation import PRIOR, reconstruct, restore
from jiio.tasks.measurement import Hole, Measurement, damage, measure
from jiio.tasks.metrics import decibel, psnr, squared_error
from jiio.tasks.ppca import PPCA

DAMAGES = ("hole", "noise-0.2", "noise-0.4")
BATCH = 500


@dataclass(frozen=True)
class Figures:
    """Sums over batches of solves."""

    error: float = 0.0
    entries: float = 0.0
    samples: int = 0
    converged: int = 0
    evaluations: int = 0
    seconds: float = 0.0

    def add(self, error: tuple[float, float], solution: Solution[State], seconds: float) -> Figures:
        """With one more batch."""
        return Figures(
            self.error + error[0],
            self.entries + error[1],
            self.samples + len(solution.status),
            self.converged + int(solution.converged.sum()),
            self.evaluations + solution.work.f + solution.work.vjp,
            self.seconds + seconds,
        )

    def summary(self) -> dict[str, float]:
        """PSNR in dB, share converged, evaluations (f and VJPs) and milliseconds a sample."""
        return {
            "psnr": decibel(self.error / self.entries),
            "converged": self.converged / self.samples,
            "evaluations": self.evaluations / self.samples,
            "seconds": self.seconds,
        }


Watch = Callable[[int], None]


def evaluate_reconstruction(
    model: Generator, images: Tensor, *, max_steps: int, prior: float = PRIOR, watch: Watch | None = None
) -> dict[str, float]:
    """PSNR of reconstructions after `max_steps` joint steps (z re-solved where it lags), and whether they converged."""
    figures = Figures()
    for batch in images.split(BATCH):
        began = time.perf_counter()
        found, solution = reconstruct(model, batch, prior=prior, max_steps=max_steps, on_failure="ignore")
        figures = figures.add(squared_error(found, batch), solution, time.perf_counter() - began)
        if watch:
            watch(len(batch))
    return figures.summary()


def evaluate_damage(
    model: Generator, baseline: PPCA, images: Tensor, name: str, *, seed: int, watch: Watch | None = None
) -> dict[str, float]:
    """One damage on all images: PSNR damaged, restored, of the baseline in range and of its posterior mean, share
    converged, evaluations, seconds. Inside the hole for a hole."""
    operator, sigma = damage(name)
    joint, sums = Figures(), {"damaged": [0.0, 0.0], "baseline": [0.0, 0.0], "posterior": [0.0, 0.0]}
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        measurement = measure(operator, batch, sigma=sigma, ids=range(first, first + len(batch)), seed=seed)
        inside = unknown(measurement)
        began = time.perf_counter()
        found, solution = restore(model, measurement, on_failure="ignore")
        joint = joint.add(squared_error(found, batch, inside), solution, time.perf_counter() - began)
        in_range, posterior = baseline.restore(measurement)
        shown = measurement.y if measurement.y.shape == batch.shape else batch
        for key, value in (("damaged", shown), ("baseline", in_range), ("posterior", posterior)):
            # a measurement is not clipped: its noise is what it is
            error, count = _raw_error(value, batch, inside) if key == "damaged" else squared_error(value, batch, inside)
            sums[key][0] += error
            sums[key][1] += count
        if watch:
            watch(len(batch))
    summary = joint.summary()
    return {
        "psnr_damaged": decibel(sums["damaged"][0] / sums["damaged"][1]),
        "psnr_restored": summary["psnr"],
        "psnr_baseline": decibel(sums["baseline"][0] / sums["baseline"][1]),
        "psnr_baseline_posterior": decibel(sums["posterior"][0] / sums["posterior"][1]),
        "converged": summary["converged"],
        "evaluations": summary["evaluations"],
        "seconds": summary["seconds"],
    }


def unknown(measurement: Measurement) -> Tensor | None:
    """Where a hole's PSNR is measured: its pixels; everywhere for other damages."""
    return 1 - measurement.parameters[0] if isinstance(measurement.operator, Hole) else None


def _raw_error(images: Tensor, truth: Tensor, mask: Tensor | None) -> tuple[float, float]:
    error = (images - truth).double().square()
    weight = torch.ones_like(error) if mask is None else mask.to(error).expand_as(error)
    return float((error * weight).sum()), float(weight.sum())


def pca_psnr(train: Tensor, test: Tensor, latent: int) -> float:
    """PSNR of plain PCA reconstructions of the same latent size."""
    return psnr(PPCA.fit(train, latent).reconstruct(test), test)


def over_seeds(results: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{key: {mean, low, high}} of the same keys over seeds."""
    from jiio.tasks.metrics import interval

    return {key: interval([result[key] for result in results]) for key in results[0]}


def report_rows(report: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of damages from {damage: {key: {mean, low, high}}}."""
    from jiio.app.table import with_interval

    return [
        [
            name,
            with_interval(values["psnr_damaged"]),
            with_interval(values["psnr_restored"]),
            with_interval(values["psnr_baseline"]),
            with_interval(values["psnr_baseline_posterior"]),
            f"{100 * values['converged']['mean']:.1f} %",
            with_interval(values["evaluations"], 0),
        ]
        for name, values in report.items()
    ]


HEADER = ("damage", "damaged dB", "restored dB", "PPCA dB", "PPCA posterior dB", "converged", "f + VJPs")
