"""`jiio demo`: train a generator on the embedded digits, restore damaged test images, compare with the baselines."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jiio.app import compare, evaluate, methods
from jiio.app.progress import stages, steps_bar
from jiio.app.run_folder import RunFolder
from jiio.app.table import console
from jiio.app.train_generation import Trainer, Training, default_config
from jiio.app.training import run_training
from jiio.data import load_images
from jiio.models import Generator
from jiio.optimizer import Adam
from jiio.tasks.generation import reconstruction, reconstruction_step
from jiio.tasks.latent_model import start
from jiio.tasks.metrics import psnr
from jiio.tasks.ppca import PPCA

SEEDS = (0, 1, 2)
SHOWN = 10
TUNED, COMPARED = 32, 64  # training images to tune the baseline on, test images to compare on
ADAM_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)


def demo(folder: Path, *, seed: int = 0, steps: int) -> dict[str, Any]:
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
        "pca_psnr": psnr(baseline.reconstruct(test), test),
    }
    with stages("reconstructing") as watch:
        report["reconstruction"] = evaluate.evaluate_reconstruction(model, test, max_steps=300, prior=training.prior)
        for name in evaluate.DAMAGES:
            watch(f"restoring {len(test)} test images: {name}")
            results = [evaluate.evaluate_damage(model, baseline, test, name, seed=s) for s in SEEDS]
            report[name] = evaluate.over_seeds(results)
        watch("comparing with nested optimisation")
        report["speed"] = speed(model, train, test, prior=training.prior)
    report["seconds"] = time.perf_counter() - began
    RunFolder(folder).write_json("report.json", report)
    picture = evaluate.restoration_picture(model, baseline, test[:SHOWN], folder / "restoration.png")
    _print(report, folder, picture)
    return report


def _train(folder: RunFolder, images: Tensor, *, seed: int, steps: int) -> tuple[Generator, Training]:
    training = Training(steps=steps, seed=seed)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = default_config(shape)
    saved = {"task": "generation", "data": "digits", "model": config.to_dict(), "training": asdict(training)}
    folder.create(saved, existing="replace")
    trainer = Trainer(images, config, training)
    steps_bar(run_training(folder, trainer, checkpoint_every=10**9), total=steps, label="training")
    return trainer.model.eval().requires_grad_(False), training


def speed(model: Generator, train: Tensor, test: Tensor, *, prior: float) -> dict[str, float]:
    """Weighted work and wall time of tuned cold nested Adam over those of the joint solve, to 1.2 times the best known
    mean cost of the test images, all re-solved; tuned on training images."""
    with torch.no_grad():
        tuning, problem = (
            reconstruction(model, images[:count], prior=prior) for images, count in ((train, TUNED), (test, COMPARED))
        )
    first, origin = start(model, TUNED), start(model, COMPARED)
    tuned, joint = (methods.Joint(reconstruction_step(model, count, prior=prior)) for count in (TUNED, COMPARED))
    adams: dict[str, methods.Method] = {f"Adam {rate}": methods.Nested(Adam(rate), warm=False) for rate in ADAM_RATES}
    goal = 1.2 * compare.reference_cost(tuning, [first], [tuned], steps=150)
    best = adams[compare.tune(adams, tuning, first, target=goal, steps=60)]
    target = 1.2 * compare.reference_cost(problem, [origin], [joint], steps=300)
    rows, _ = compare.compare(
        {"joint": joint, "cold": best},
        problem,
        origin,
        targets={"1.2": target},
        budgets={"joint": 150, "cold": 120},
        repeats=3,
    )
    mine, other = rows
    if mine.work is None or other.work is None or mine.seconds is None or other.seconds is None:
        return {"work_ratio": float("nan"), "seconds_ratio": float("nan"), "target_cost": target}
    return {
        "work_ratio": other.work / mine.work,
        "seconds_ratio": other.seconds / mine.seconds,
        "target_cost": target,
    }


def _print(report: dict[str, Any], folder: Path, picture: Path) -> None:
    title = (
        f"Restoration of {report['images']} test digits, latent {report['latent']}, {len(SEEDS)} draws of the damage"
    )
    evaluate.show_damages(title, report)
    console.print(
        f"reconstruction {report['reconstruction']['psnr']:.2f} dB (PCA {report['pca_psnr']:.2f} dB); "
        + _speed_sentence(report["speed"])
    )
    console.print(f"{report['seconds']:.0f} s in all; wrote {folder / 'report.json'} and {picture}")


def _speed_sentence(ratio: dict[str, float]) -> str:
    if math.isnan(ratio["work_ratio"]):
        return "the joint solve or tuned nested Adam missed the target cost, so there is no ratio of their work"
    return (
        f"against tuned nested Adam the joint solve takes 1/{ratio['work_ratio']:.1f} of the work and "
        f"1/{ratio['seconds_ratio']:.1f} of the time"
    )
