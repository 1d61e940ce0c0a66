"""`jiio evaluate RUN` of a variational autoencoder: its encoder alone, and the search for latents that a generator gets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jiio.app.evaluate import (
    BUDGETS,
    DAMAGES,
    evaluate_damage,
    over_seeds,
    reconstruct_all,
    show_damages,
)
from jiio.app.features import Features
from jiio.app.frechet import frechet_figures, show_frechet
from jiio.app.progress import Count
from jiio.app.table import counted, show
from jiio.load import device_of
from jiio.models import VAE
from jiio.tasks.latent_model import density
from jiio.tasks.metrics import psnr
from jiio.tasks.ppca import PPCA
from jiio.tasks.vae import decode, encode

STARTS = ("encoder", "mean")


def evaluate(
    model: VAE, baseline: PPCA, test: Tensor, *, draws: int = 3, damages: Sequence[str] = DAMAGES,
    features: Features | None = None, seed: int = 0, watch: Count | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Reconstruction by the encoder's mean, and by the joint solve from there and from the mean of all latents, Frechet
    distances on `features` of its reconstructions and samples, every damage over `draws` draws, PCA by `baseline`; `watch`
    is told of every batch done (`evaluated_images` in all)."""
    report: dict[str, Any] = {"images": len(test), "latent": model.config.latent, "draws": draws}
    report["pixel_variance"] = float(model.pixel_variance)
    report["pca_psnr"] = psnr(baseline.reconstruct(test), test)
    # what a first call costs is nobody's time
    decode(model, encode(model, test[:1].to(device_of(model)))[0])
    reconstruct_all(model.generator, test[:1], max_steps=1)
    began = time.perf_counter()
    latent = encode(model, test.to(device_of(model)))[0]
    decoded = decode(model, latent).cpu()
    report["encoder"] = {"psnr": psnr(decoded, test), "seconds": time.perf_counter() - began}
    middle = density(model.generator).center().expand_as(latent)
    searched: dict[str, Tensor] = {}
    for name, first in zip(STARTS, (latent, middle), strict=True):
        report[f"search_from_{name}"] = {}
        for steps in BUDGETS:
            searched[name], figures = reconstruct_all(
                model.generator, test, max_steps=steps, prior=float(model.pixel_variance), latent=first, watch=watch
            )
            report[f"search_from_{name}"][str(steps)] = figures
    if features is not None:
        copies = {"encoder": decoded, "reconstructions": searched["encoder"]}
        report["frechet"] = frechet_figures(
            model.generator, features, test, copies, kinds=("mixture", "prior"), seed=seed
        )
    for name in damages:
        results = [evaluate_damage(model.generator, baseline, test, name, seed=s, watch=watch) for s in range(draws)]
        report[name] = over_seeds(results)
    return report


def evaluated_images(images: int, draws: int, damages: Sequence[str] = DAMAGES) -> int:
    """How many solves `evaluate` does for so many images."""
    return images * (len(STARTS) * len(BUDGETS) + len(damages) * draws)


def show_report(report: dict[str, Any], damages: Sequence[str] = DAMAGES) -> None:
    """Both tables of an evaluation."""
    lines = [["encoder's mean", "0", f"{report['encoder']['psnr']:.2f}", "", "", f"{report['encoder']['seconds']:.1f}"]]
    for name, label in zip(STARTS, ("from the encoder's mean", "from the mean latent"), strict=True):
        lines += [
            [label, steps, f"{v['psnr']:.2f}", f"{100 * v['converged']:.1f} %", f"{v['evaluations']:.0f}",
             f"{v['seconds']:.1f}"]
            for steps, v in report[f"search_from_{name}"].items()
        ]  # fmt: skip
    title = (
        f"Reconstruction of {report['images']} test images by a VAE (PCA of latent {report['latent']}: "
        f"{report['pca_psnr']:.2f} dB)"
    )
    header = ("latent", "joint steps", "PSNR dB", "converged", "f + VJPs", "seconds")
    show(title, header, lines, note=f"pixel variance {report['pixel_variance']:.2g}")
    if "frechet" in report:
        show_frechet(report["frechet"])
    show_damages(f"Restoration, {counted(report['draws'], 'draw')} of the damage", report, damages)
