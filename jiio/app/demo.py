"""`jiio demo`: train a generator on the embedded digits, restore damaged test images, compare with the baselines."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app import compare, evaluate
from jiio.app.figure import image_grid
from jiio.app.progress import steps_bar
from jiio.app.run_folder import RunFolder
from jiio.app.table import console, show
from jiio.app.train_generation import Trainer, Training, default_config, run_training
from jiio.data import load_images
from jiio.models import Generator
from jiio.optimizer import Adam
from jiio.tasks.generation import reconstruction, reconstruction_step, restore, start
from jiio.tasks.measurement import damage, measure
from jiio.tasks.metrics import each_psnr
from jiio.tasks.ppca import PPCA

STEPS = 600
SEEDS = (0, 1, 2)
SHOWN = 10
ADAM_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)


def demo(folder: Path, *, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
    """The whole demo; writes report.json and restoration.png into `folder` and returns the report."""
    began = time.perf_counter()
    train, test = load_images("digits", "train"), load_images("digits", "test")
    model, training = _train(RunFolder(folder), train, seed=seed, steps=steps)
    baseline = PPCA.fit(train, model.config.latent)
    report: dict[str, Any] = {
        "data": "digits",
        "images": len(test),
        "latent": model.config.latent,
        "seeds": list(SEEDS),
        "training": asdict(training) | {"seconds": time.perf_counter() - began},
        "pca_psnr": evaluate.pca_psnr(train, test, model.config.latent),
        "reconstruction": evaluate.evaluate_reconstruction(model, test, max_steps=300, prior=training.prior),
    }
    for name in evaluate.DAMAGES:
        with console.status(f"restoring {len(test)} test images: {name}"):
            results = [evaluate.evaluate_damage(model, baseline, test, name, seed=s) for s in SEEDS]
        report[name] = evaluate.over_seeds(results)
    with console.status("comparing with nested optimisation"):
        report["speed"] = speed(model, train, test, prior=training.prior)
    report["seconds"] = time.perf_counter() - began
    RunFolder(folder).write_json("report.json", report)
    picture = restoration_picture(model, baseline, test[:SHOWN], folder / "restoration.png")
    _print(report, folder, picture)
    return report


def _train(folder: RunFolder, images: Tensor, *, seed: int, steps: int) -> tuple[Generator, Training]:
    training = Training(steps=steps, seed=seed)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = default_config(shape)
    saved = {"task": "generation", "data": "digits", "model": config.to_dict(), "training": asdict(training)}
    folder.create(saved, resume=False)
    trainer = Trainer(images, config, training)
    steps_bar(run_training(folder, trainer, checkpoint_every=10**9), total=steps, label="training a digits generator")
    return trainer.model.eval().requires_grad_(False), training


def speed(model: Generator, train: Tensor, test: Tensor, *, prior: float) -> dict[str, float]:
    """Weighted work and wall time of tuned cold nested Adam over those of the joint solve, to 1.2 times the best known
    mean cost of 64 test images, all re-solved."""
    with torch.no_grad():
        tuning, problem = (reconstruction(model, images[:64], prior=prior) for images in (train, test))
    origin = start(model, 64)
    joint = compare.Joint(reconstruction_step(model, 64, prior=prior))
    adams: dict[str, compare.Method] = {f"Adam {rate}": compare.Nested(Adam(rate), warm=False) for rate in ADAM_RATES}
    goal = 1.2 * compare.reference_cost(tuning, [origin], [joint], steps=150)
    best = adams[compare.tune(adams, tuning, origin, target=goal, steps=60)]
    target = 1.2 * compare.reference_cost(problem, [origin], [joint], steps=300)
    rows, _ = compare.compare(
        {"joint": joint, "cold": best}, problem, origin, targets={"1.2": target}, budgets={"joint": 150, "cold": 120}
    )
    mine, other = rows
    if mine.work is None or other.work is None or mine.seconds is None or other.seconds is None:
        return {"work_ratio": float("nan"), "seconds_ratio": float("nan"), "target_cost": target}
    return {
        "work_ratio": other.work / mine.work,
        "seconds_ratio": other.seconds / mine.seconds,
        "target_cost": target,
    }


def restoration_picture(model: Generator, baseline: PPCA, images: Tensor, path: Path) -> Path:
    """Truth, damaged, restored and baseline for each damage, PSNR below each image."""
    rows: list[tuple[str, Tensor, list[str] | None]] = [("truth", images, None)]
    for name in evaluate.DAMAGES:
        operator, sigma = damage(name)
        measurement = measure(operator, images, sigma=sigma)
        inside = evaluate.unknown(measurement)
        restored, _ = restore(model, measurement, on_failure="ignore")
        in_range, _ = baseline.restore(measurement)
        for label, shown in ((name, measurement.y), ("joint solve", restored), ("PPCA", in_range)):
            if inside is not None:
                shown = torch.where(inside > 0, shown, images)
            captions = [f"{value:.1f} dB" for value in each_psnr(shown, images, inside)]
            rows.append((label, shown, captions))
    return image_grid(rows, path, title="Restoration of test digits (PSNR inside the hole, else of the image)")


def _print(report: dict[str, Any], folder: Path, picture: Path) -> None:
    show(
        f"Restoration of {report['images']} test digits, latent {report['latent']}, {len(SEEDS)} draws of the damage",
        evaluate.HEADER,
        evaluate.report_rows({name: report[name] for name in evaluate.DAMAGES}),
        note="PSNR inside the hole for `hole`. PPCA: probabilistic PCA of the same latent size.",
    )
    ratio = report["speed"]
    console.print(
        f"reconstruction {report['reconstruction']['psnr']:.2f} dB (PCA {report['pca_psnr']:.2f} dB); against tuned nested "
        f"Adam the joint solve takes 1/{ratio['work_ratio']:.1f} of the work and 1/{ratio['seconds_ratio']:.1f} of the time"
    )
    console.print(f"{report['seconds']:.0f} s in all; wrote {folder / 'report.json'} and {picture}")
