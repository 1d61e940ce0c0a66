"""`jiio evaluate RUN`: reconstruction and restoration of test images, beside the linear baseline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jiio.app.features import Features
from jiio.app.figure import image_grid
from jiio.app.frechet import frechet_figures, show_frechet
from jiio.app.progress import Count
from jiio.app.table import counted, show, with_interval
from jiio.load import device_of
from jiio.models import Generator
from jiio.problem import State
from jiio.solution import Solution
from jiio.tasks.generation import PRIOR, reconstruct
from jiio.tasks.measurement import EVALUATED, Hole, Measurement, damage, measure
from jiio.tasks.metrics import decibel, each_psnr, interval, psnr, squared_error
from jiio.tasks.ppca import PPCA
from jiio.tasks.restoration import posterior_mean, restore
from jiio.tasks.ssim import ssim

DAMAGES = EVALUATED
BUDGETS = (40, 80, 300)  # joint steps; the last is the default of `solve`
BATCH = 500


@dataclass(frozen=True)
class Quality:
    """Sums over images: of squared errors, over how many entries, of SSIM, over how many images."""

    error: float = 0.0
    entries: float = 0.0
    similarity: float = 0.0
    images: int = 0

    @classmethod
    def of(cls, images: Tensor, truth: Tensor, inside: Tensor | None = None) -> Quality:
        """The error where `inside` is 1 (everywhere without it), the SSIM of whole images, which are the truth elsewhere."""
        error, entries = squared_error(images, truth, inside)
        whole = images if inside is None else torch.where(inside > 0, images, truth)
        return cls(error, entries, float(ssim(whole, truth).double().sum()), len(images))

    def __add__(self, other: Quality) -> Quality:
        return Quality(
            self.error + other.error,
            self.entries + other.entries,
            self.similarity + other.similarity,
            self.images + other.images,
        )

    @property
    def psnr(self) -> float:
        """In dB, of the pooled error."""
        return decibel(self.error / self.entries)

    @property
    def ssim(self) -> float:
        """Mean over the images."""
        return self.similarity / self.images


@dataclass(frozen=True)
class Figures:
    """Sums over batches of solves."""

    quality: Quality = Quality()
    converged: int = 0
    evaluations: int = 0
    seconds: float = 0.0

    def add(self, quality: Quality, solution: Solution[State], seconds: float) -> Figures:
        """With one more batch."""
        return Figures(
            self.quality + quality,
            self.converged + int(solution.converged.sum()),
            self.evaluations + solution.work.f + solution.work.vjp,
            self.seconds + seconds,
        )

    def summary(self) -> dict[str, float]:
        """PSNR in dB, SSIM, share converged, evaluations (f and VJPs) a sample, seconds in all."""
        images = self.quality.images
        return {
            "psnr": self.quality.psnr,
            "ssim": self.quality.ssim,
            "converged": self.converged / images,
            "evaluations": self.evaluations / images,
            "seconds": self.seconds,
        }


def evaluate(
    model: Generator, baseline: PPCA, test: Tensor, *, prior: float = PRIOR, draws: int = 3,
    damages: Sequence[str] = DAMAGES, features: Features | None = None, seed: int = 0, watch: Count | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Reconstruction at several budgets of steps, Frechet distances of reconstructions and of samples drawn by `seed` on
    `features`, every damage over `draws` draws, PCA and probabilistic PCA by `baseline`; `watch` is told of every batch
    done (`evaluated_images` in all)."""
    reconstructed = test
    report: dict[str, Any] = {"images": len(test), "latent": model.config.latent, "draws": draws}
    pca = baseline.reconstruct(test)
    report |= {"damages": list(damages), "pca_psnr": psnr(pca, test), "pca_ssim": Quality.of(pca, test).ssim}
    report["reconstruction"] = {}
    evaluate_reconstruction(model, test[:1], max_steps=1, prior=prior)  # what a first call costs is no budget's time
    for steps in BUDGETS:
        reconstructed, figures = reconstruct_all(model, test, max_steps=steps, prior=prior, watch=watch)
        report["reconstruction"][str(steps)] = figures
    if features is not None:
        copies = {"reconstructions": reconstructed}
        report["frechet"] = frechet_figures(model, features, test, copies, kinds=("mixture",), seed=seed)
    for name in damages:
        results = [evaluate_damage(model, baseline, test, name, seed=draw, watch=watch) for draw in range(draws)]
        report[name] = over_seeds(results)
    return report


def evaluated_images(images: int, draws: int, damages: Sequence[str] = DAMAGES) -> int:
    """How many solves `evaluate` does for so many images."""
    return images * (len(BUDGETS) + len(damages) * draws)


def evaluate_reconstruction(
    model: Generator, images: Tensor, *, max_steps: int, prior: float = PRIOR, watch: Count | None = None
) -> dict[str, float]:
    """PSNR of reconstructions after `max_steps` joint steps (z re-solved where it lags), and whether they converged."""
    return reconstruct_all(model, images, max_steps=max_steps, prior=prior, watch=watch)[1]


def reconstruct_all(
    model: Generator, images: Tensor, *, max_steps: int, prior: float = PRIOR, latent: Tensor | None = None,
    watch: Count | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """(reconstructions from the model's guess or from `latent`, figures as `evaluate_reconstruction` gives them)."""
    figures, parts = Figures(), []
    starts = repeat(None) if latent is None else latent.split(BATCH)
    for batch, first in zip(images.split(BATCH), starts, strict=False):
        began = time.perf_counter()
        on_device = batch.to(device_of(model))
        found, solution = reconstruct(
            model, on_device, prior=prior, latent=first, max_steps=max_steps, on_failure="ignore"
        )
        parts.append(found.cpu())
        figures = figures.add(Quality.of(parts[-1].clamp(0, 1), batch), solution, time.perf_counter() - began)
        if watch:
            watch(len(batch))
    return torch.cat(parts), figures.summary()


def evaluate_damage(
    model: Generator, baseline: PPCA, images: Tensor, name: str, *, seed: int, watch: Count | None = None
) -> dict[str, float]:
    """One damage on all images: PSNR and SSIM damaged, restored in the generator's range, as its posterior mean, and of the
    baseline in both ways, and in range with a residual as the generator's posterior has it; share converged, evaluations,
    seconds. PSNR inside the hole for a hole."""
    operator, sigma = damage(name)
    joint = Figures()
    sums = {key: Quality() for key in (*IN_RANGE, *POSTERIOR) if key != "restored"}
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        measurement = measure(operator, batch, sigma=sigma, ids=range(first, first + len(batch)), seed=seed)
        inside, on_device = unknown(measurement), measurement.to(device_of(model))
        began = time.perf_counter()
        found, solution = restore(model, on_device, on_failure="ignore")
        seconds = time.perf_counter() - began
        joint = joint.add(Quality.of(found.cpu().clamp(0, 1), batch, inside), solution, seconds)
        in_range, posterior = baseline.restore(measurement)
        sums["damaged"] += Quality.of(enlarged(measurement), batch, inside)  # its noise is what it is: not clipped
        for key, value in (
            ("posterior", posterior_mean(model, found, on_device).cpu()),
            ("baseline", in_range),
            ("baseline_posterior", posterior),
            ("baseline_residual", baseline.residual.posterior_mean(in_range, measurement)),
        ):
            sums[key] += Quality.of(value.clamp(0, 1), batch, inside)
        if watch:
            watch(len(batch))
    summary = joint.summary()
    return (
        {f"psnr_{key}": value.psnr for key, value in sums.items()}
        | {f"ssim_{key}": value.ssim for key, value in sums.items()}
        | {"psnr_restored": summary["psnr"], "ssim_restored": summary["ssim"]}
        | {key: summary[key] for key in ("converged", "evaluations", "seconds")}
    )


def enlarged(measurement: Measurement) -> Tensor:
    """The measurement as an image of the true size: bicubic where it is smaller."""
    size = measurement.image_shape[1:]
    y = measurement.y
    return y if y.shape[2:] == size else F.interpolate(y, size=size, mode="bicubic", align_corners=False)


def unknown(measurement: Measurement) -> Tensor | None:
    """Where a hole's PSNR is measured: its pixels; everywhere for other damages."""
    return 1 - measurement.parameters[0] if isinstance(measurement.operator, Hole) else None


def over_seeds(results: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{key: {mean, low, high}} of the same keys over seeds."""
    return {key: interval([result[key] for result in results]) for key in results[0]}


IN_RANGE = {"damaged": "damaged", "restored": "generator", "baseline": "PPCA"}
POSTERIOR = {"posterior": "generator", "baseline_posterior": "PPCA", "baseline_residual": "PPCA, residual"}


def show_report(report: dict[str, Any]) -> None:
    """The tables of an evaluation."""
    header = ("joint steps", "PSNR dB", "SSIM", "converged", "f + VJPs", "seconds")
    lines = [
        [
            steps,
            f"{v['psnr']:.2f}",
            f"{v['ssim']:.3f}",
            f"{100 * v['converged']:.1f} %",
            f"{v['evaluations']:.0f}",
            f"{v['seconds']:.1f}",
        ]
        for steps, v in report["reconstruction"].items()
    ]
    pca = f"PCA of latent {report['latent']}: {report['pca_psnr']:.2f} dB, SSIM {report['pca_ssim']:.3f}"
    show(f"Reconstruction of {report['images']} test images ({pca})", header, lines)
    if "frechet" in report:
        show_frechet(report["frechet"])
    if report["damages"]:
        show_damages(f"Restoration, {counted(report['draws'], 'draw')} of the damage", report, report["damages"])


def show_damages(title: str, report: dict[str, Any], damages: Sequence[str] = DAMAGES) -> None:
    """The tables of damages: PSNR, SSIM, solves."""
    chosen = {name: report[name] for name in damages}

    def table(title: str, columns: dict[str, str], note: str) -> None:
        lines = [[name, *(with_interval(v[f"psnr_{key}"], 1) for key in columns)] for name, v in chosen.items()]
        show(title, ("damage", *columns.values()), lines, note=note)

    table(
        title,
        IN_RANGE,
        "PSNR in dB, inside the hole for `hole`, of what latents alone make. PPCA: probabilistic PCA of the same latent size",
    )
    table(
        "Posterior means of the same images, given latents and measurement",
        POSTERIOR,
        "residual: PPCA's latents with what images stray by described as for the generator, where neighbours go together",
    )
    lines = [
        [name, *(f"{v[f'ssim_{key}']['mean']:.3f}" for key in (*IN_RANGE, *POSTERIOR))] for name, v in chosen.items()
    ]
    header = ("damage", *IN_RANGE.values(), *(f"posterior:\n{label}" for label in POSTERIOR.values()))
    show("SSIM of the same images, known pixels of a hole kept", header, lines)
    solves = [
        [name, f"{100 * v['converged']['mean']:.1f} %", with_interval(v["evaluations"], 0)]
        for name, v in chosen.items()
    ]
    show("Solves, by image", ("damage", "converged", "f + VJPs"), solves)


def restoration_picture(
    model: Generator, baseline: PPCA, images: Tensor, path: Path, *, damages: Sequence[str] = DAMAGES
) -> Path:
    """Truth, and for each damage the damaged, restored, posterior and baseline images, PSNR below each image."""
    rows: list[tuple[str, Tensor, list[str] | None]] = [("truth", images, None)]
    for name in damages:
        operator, sigma = damage(name)
        measurement = measure(operator, images, sigma=sigma)
        inside = unknown(measurement)
        on_device = measurement.to(device_of(model))
        restored, _ = restore(model, on_device, on_failure="ignore")
        made = {name: enlarged(measurement), "in range": restored.cpu()}
        made["posterior"] = posterior_mean(model, restored, on_device).cpu()
        made["PPCA"], _ = baseline.restore(measurement)
        for label, shown in made.items():
            if inside is not None:
                shown = torch.where(inside > 0, shown, images)
            captions = [f"{value:.1f} dB" for value in each_psnr(shown, images, inside)]
            rows.append((label, shown, captions))
    return image_grid(rows, path, title="Restoration of test images (PSNR inside the hole, else of the image)")
