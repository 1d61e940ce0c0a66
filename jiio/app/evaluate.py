"""`jiio evaluate RUN`: reconstruction and restoration of test images, beside the linear baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app.figure import image_grid
from jiio.app.restore import to_device
from jiio.app.table import show, with_interval
from jiio.models import Generator
from jiio.problem import State
from jiio.solution import Solution
from jiio.tasks.generation import PRIOR, reconstruct, restore
from jiio.tasks.measurement import Hole, Measurement, damage, measure
from jiio.tasks.metrics import decibel, each_psnr, interval, psnr, squared_error
from jiio.tasks.ppca import PPCA

DAMAGES = ("hole", "noise-0.2", "noise-0.4")
BUDGETS = (40, 80, 300)  # joint steps; the last is the default of `solve`
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
        """PSNR in dB, share converged, evaluations (f and VJPs) a sample, seconds in all."""
        return {
            "psnr": decibel(self.error / self.entries),
            "converged": self.converged / self.samples,
            "evaluations": self.evaluations / self.samples,
            "seconds": self.seconds,
        }


Watch = Callable[[int], None]


def evaluate(
    model: Generator, train: Tensor, test: Tensor, *, prior: float = PRIOR, draws: int = 3, watch: Watch | None = None
) -> dict[str, Any]:
    """Reconstruction at several budgets of steps, every damage over `draws` draws, PCA and probabilistic PCA fitted on
    `train`; `watch` is told of every batch done (`evaluated_images` in all)."""
    baseline = PPCA.fit(train, model.config.latent)
    report: dict[str, Any] = {"images": len(test), "latent": model.config.latent, "draws": draws}
    report["pca_psnr"] = psnr(baseline.reconstruct(test), test)
    report["reconstruction"] = {
        str(steps): evaluate_reconstruction(model, test, max_steps=steps, prior=prior, watch=watch) for steps in BUDGETS
    }
    for name in DAMAGES:
        results = [evaluate_damage(model, baseline, test, name, seed=seed, watch=watch) for seed in range(draws)]
        report[name] = over_seeds(results)
    return report


def evaluated_images(images: int, draws: int) -> int:
    """How many solves `evaluate` does for so many images."""
    return images * (len(BUDGETS) + len(DAMAGES) * draws)


def evaluate_reconstruction(
    model: Generator, images: Tensor, *, max_steps: int, prior: float = PRIOR, watch: Watch | None = None
) -> dict[str, float]:
    """PSNR of reconstructions after `max_steps` joint steps (z re-solved where it lags), and whether they converged."""
    figures = Figures()
    for batch in images.split(BATCH):
        began = time.perf_counter()
        on_device = batch.to(model.bias.device)
        found, solution = reconstruct(model, on_device, prior=prior, max_steps=max_steps, on_failure="ignore")
        figures = figures.add(squared_error(found.cpu(), batch), solution, time.perf_counter() - began)
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
        found, solution = restore(model, to_device(measurement, model.bias.device), on_failure="ignore")
        joint = joint.add(squared_error(found.cpu(), batch, inside), solution, time.perf_counter() - began)
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


def over_seeds(results: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{key: {mean, low, high}} of the same keys over seeds."""
    return {key: interval([result[key] for result in results]) for key in results[0]}


def report_rows(report: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of damages from {damage: {key: {mean, low, high}}}."""
    return [
        [
            name,
            *(
                with_interval(values[f"psnr_{key}"], 1)
                for key in ("damaged", "restored", "baseline", "baseline_posterior")
            ),
            f"{100 * values['converged']['mean']:.1f} %",
            with_interval(values["evaluations"], 0),
        ]
        for name, values in report.items()
    ]


HEADER = ("damage", "damaged", "restored", "PPCA", "posterior", "converged", "f + VJPs")


def show_report(report: dict[str, Any]) -> None:
    """Both tables of an evaluation."""
    header = ("joint steps", "PSNR dB", "converged", "f + VJPs", "seconds")
    lines = [
        [steps, f"{v['psnr']:.2f}", f"{100 * v['converged']:.1f} %", f"{v['evaluations']:.0f}", f"{v['seconds']:.1f}"]
        for steps, v in report["reconstruction"].items()
    ]
    title = f"Reconstruction of {report['images']} test images (PCA of latent {report['latent']}: {report['pca_psnr']:.2f} dB)"
    show(title, header, lines)
    show_damages(f"Restoration, {report['draws']} draws of the damage", report)


def show_damages(title: str, report: dict[str, Any]) -> None:
    """The table of damages."""
    note = (
        "PSNR in dB, inside the hole for `hole`. PPCA: probabilistic PCA of the same latent size, in its range; "
        "posterior: its posterior mean"
    )
    show(title, HEADER, report_rows({name: report[name] for name in DAMAGES}), note=note)


def restoration_picture(model: Generator, baseline: PPCA, images: Tensor, path: Path) -> Path:
    """Truth, and for each damage the damaged, restored and baseline images, PSNR below each image."""
    rows: list[tuple[str, Tensor, list[str] | None]] = [("truth", images, None)]
    for name in DAMAGES:
        operator, sigma = damage(name)
        measurement = measure(operator, images, sigma=sigma)
        inside = unknown(measurement)
        restored, _ = restore(model, to_device(measurement, model.bias.device), on_failure="ignore")
        in_range, _ = baseline.restore(measurement)
        for label, shown in ((name, measurement.y), ("joint solve", restored.cpu()), ("PPCA", in_range)):
            if inside is not None:
                shown = torch.where(inside > 0, shown, images)
            captions = [f"{value:.1f} dB" for value in each_psnr(shown, images, inside)]
            rows.append((label, shown, captions))
    return image_grid(rows, path, title="Restoration of test images (PSNR inside the hole, else of the image)")
