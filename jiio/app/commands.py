"""The commands' options, and what each does with them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from jiio.app.run_folder import RunFolder, UserError
from jiio.app.table import console, show
from jiio.data import load_images
from jiio.load import find_run, load, read_config
from jiio.models import Generator
from jiio.tasks.generation import PRIOR

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    device: str = "cpu"
    """cpu, or cuda where there is one."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = field(default_factory=lambda: min(os.cpu_count() or 1, 8))
    """CPU threads; set explicitly for timings."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Demo(Common):
    """Train a generator on scikit-learn's digits (about a minute), restore damaged test images, print a table.

    Example: jiio demo
    """

    output: Path = Path("runs/demo")
    """Folder for report.json and restoration.png."""
    steps: int = 600
    """Optimiser steps of the training."""


def demo(options: Demo) -> dict[str, Any]:
    """`jiio demo`."""
    from jiio.app.demo import demo as run

    return run(options.output, seed=options.seed, steps=options.steps)


@dataclass(frozen=True)
class TrainGeneration(Common):
    """Train a generator of images by joint latent optimisation.

    Example: jiio train generation --data mnist --data-dir DATA
    """

    data: str = "digits"
    """digits, mnist, fashion-mnist, or folder:PATH for a folder of images."""
    data_dir: Path | None = None
    """Folder that holds the data sets; the environment variable JIIO_DATA_DIR otherwise."""
    output: Path | None = None
    """Run folder; runs/generation-DATA-SEED otherwise."""
    resume: bool = False
    """Go on from the last checkpoint of the same command."""
    latent: int | None = None
    """Entries of the latent vector; 16, 32 or 64 by the images' size otherwise."""
    size: int | None = None
    """Side to which the images of a folder are resized (32 otherwise)."""
    cell: Literal["well_posed", "mdeq"] = "well_posed"
    """well_posed is a contraction by construction; mdeq is the paper's cell."""
    steps: int = 1500
    """Optimiser steps."""
    images: int = 16384
    """Training images used, chosen by the seed; 0 for all."""
    batch: int = 64
    """Images a step."""
    joint_steps: int = 20
    """Joint steps of the inner solve of a batch."""
    learning_rate: float = 2e-3
    """Of Adam, at its highest."""
    jacobian: float | None = None
    """Weight of the Jacobian penalty; 1.0 for mdeq, 0 for well_posed otherwise."""


def train_generation(options: TrainGeneration) -> dict[str, Any]:
    """`jiio train generation`."""
    from jiio.app.progress import steps_bar
    from jiio.app.train_generation import Training, default_folder, make_trainer, run_training

    jacobian = options.jacobian if options.jacobian is not None else float(options.cell == "mdeq")
    training = Training(
        images=options.images,
        steps=options.steps,
        batch=options.batch,
        joint_steps=options.joint_steps,
        learning_rate=options.learning_rate,
        jacobian=jacobian,
        seed=options.seed,
    )
    trainer, config = make_trainer(
        options.data,
        training,
        data_dir=_text(options.data_dir),
        latent=options.latent,
        cell=options.cell,
        size=options.size,
    )
    folder = RunFolder(options.output or default_folder(options.data, options.seed))
    folder.create(config, resume=options.resume)
    if options.resume:
        state, problems = folder.load_checkpoint(trainer.model)
        for problem in problems:
            console.print(f"[yellow]skipped a damaged checkpoint: {problem}[/]")
        if state is not None:
            trainer.restore(state)
        folder.rewind_log(trainer.step)
    label = f"training on {len(trainer.images)} images"
    steps_bar(run_training(folder, trainer), total=training.steps, label=label, done=trainer.step)
    console.print(f"wrote {folder.path}; next: jiio evaluate {folder.path}")
    return {"run": str(folder.path), "steps": trainer.step}


@dataclass(frozen=True)
class Evaluate(Common):
    """Reconstruction and restoration of test images by a trained generator, beside PCA and probabilistic PCA.

    Example: jiio evaluate mnist-generator --data-dir DATA
    """

    run: Positional[str] = "digits-generator"
    """Run folder or the name of a packaged model."""
    data_dir: Path | None = None
    """Folder that holds the data sets; the environment variable JIIO_DATA_DIR otherwise."""
    images: int = 1000
    """Test images, chosen by a fixed seed; 0 for all."""
    draws: int = 3
    """Draws of every damage."""


def evaluate(options: Evaluate) -> dict[str, Any]:
    """`jiio evaluate RUN`."""
    from jiio.app.evaluate import DAMAGES, HEADER, evaluate_damage, evaluate_reconstruction, over_seeds, pca_psnr
    from jiio.app.evaluate import report_rows as rows
    from jiio.tasks.ppca import PPCA

    folder, model, config = _open(options.run, options.device)
    train, test = (_images(config, split, options.data_dir) for split in ("train", "test"))
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: options.images or len(test)]
    test, prior = test[chosen], config.get("training", {}).get("prior", PRIOR)
    baseline = PPCA.fit(train, model.config.latent)
    report: dict[str, Any] = {"data": config["data"], "images": len(test), "latent": model.config.latent}
    report["pca_psnr"] = pca_psnr(train, test, model.config.latent)
    budgets = (40, 80, 300)
    with console.status("reconstructing"):
        report["reconstruction"] = {
            str(steps): evaluate_reconstruction(model, test, max_steps=steps, prior=prior) for steps in budgets
        }
    for name in DAMAGES:
        with console.status(f"restoring: {name}"):
            report[name] = over_seeds(
                [evaluate_damage(model, baseline, test, name, seed=seed) for seed in range(options.draws)]
            )
    header = ("joint steps", "PSNR dB", "converged", "f + VJPs", "seconds")
    lines = [
        [str(k), f"{v['psnr']:.2f}", f"{100 * v['converged']:.1f} %", f"{v['evaluations']:.0f}", f"{v['seconds']:.1f}"]
        for k, v in report["reconstruction"].items()
    ]
    show(f"Reconstruction of {len(test)} test images (PCA: {report['pca_psnr']:.2f} dB)", header, lines)
    show("Restoration", HEADER, rows({name: report[name] for name in DAMAGES}), note="Inside the hole for `hole`.")
    if (folder / "metrics.jsonl").exists():
        RunFolder(folder).write_json("report.json", report)
    return report


@dataclass(frozen=True, kw_only=True)
class Restore(Common):
    """Restore image files with a trained generator.

    Examples: jiio restore mnist-generator digit.png --damage hole
              jiio restore RUN scan.png --mask known.png --noise 0.1 -o restored
    """

    run: Positional[str]
    """Run folder or the name of a packaged model."""
    images: Positional[tuple[Path, ...]]
    """Image files of the size the model was trained on."""
    damage: str | None = None
    """Damage clean files first: hole, pixels, blur, downsample, or noise-0.2 (any level, on the scale [-1, 1])."""
    mask: Path | None = None
    """For files that are damaged already: an image of the same size, white where pixels are known."""
    noise: float = 0.0
    """For files that are damaged already: the noise's standard deviation, pixels in [0, 1]."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("restored")
    """Folder for the restored files and a picture beside the originals."""


def restore(options: Restore) -> dict[str, Any]:
    """`jiio restore RUN IMAGE...`."""
    from jiio.app.figure import image_grid
    from jiio.app.restore import damaged_measurement, given_measurement, read_images, restore_files

    if not options.images:
        raise UserError("name at least one image file")
    if options.damage and (options.mask or options.noise):
        raise UserError("--damage is for clean files, --mask and --noise for damaged ones: give one or the other")
    _, model, _ = _open(options.run, options.device)
    images = read_images(options.images, model)
    if options.damage:
        measurement = damaged_measurement(images, options.damage, seed=options.seed)
    else:
        measurement = given_measurement(images, options.mask, options.noise)
    written, restored, converged = restore_files(model, options.images, measurement, options.output)
    shown = measurement.y if measurement.y.shape == images.shape else measurement.operator.adjoint(measurement.y)
    rows = [("given", images, None), ("measured", shown, None), ("restored", restored, None)]
    picture = image_grid(rows if options.damage else rows[1:], options.output / "restoration.png")
    for path, good in zip(written, converged.tolist(), strict=True):
        console.print(f"{path}" + ("" if good else "  [yellow](the solve did not converge)[/]"))
    console.print(f"side by side: {picture}")
    return {"files": [str(path) for path in written], "picture": str(picture), "converged": converged.tolist()}


@dataclass(frozen=True, kw_only=True)
class Diagnose(Common):
    """Explain how the inner solve of a model behaves and what to change: contraction, curvature, lag, gradient error.

    Example: jiio diagnose digits-generator
    """

    run: Positional[str]
    """Run folder or the name of a packaged model."""
    data_dir: Path | None = None
    """Folder that holds the data sets; the environment variable JIIO_DATA_DIR otherwise."""
    images: int = 32
    """Test images to look at."""
    picture: Path | None = None
    """Picture of the residuals; diagnose.png in the run folder otherwise."""


def diagnose(options: Diagnose) -> dict[str, Any]:
    """`jiio diagnose RUN`."""
    from jiio.app.diagnose import diagnose as run

    folder, model, config = _open(options.run, options.device)
    images = _images(config, "test", options.data_dir)[: options.images]
    writable = (folder / "metrics.jsonl").exists()
    picture = options.picture or (folder if writable else Path(".")) / "diagnose.png"
    result = run(model, images, prior=config.get("training", {}).get("prior", PRIOR), picture=picture)
    console.print(result["report"])
    console.print(
        f"spectral radius of f: median {result['spectral_radius']['median']:.2f}, "
        f"largest {result['spectral_radius']['largest']:.2f}\n"
        f"curvature of the latents: {result['curvature']['least']:.3g} to {result['curvature']['largest']:.3g}; after "
        f"preconditioning {result['preconditioned']['least']:.2f} to {result['preconditioned']['largest']:.2f} "
        f"(medians), at worst {result['preconditioned']['worst']:.1f}\n"
        f"first-order outer gradient: cosine {result['gradient']['cosine']:.3f}, relative error "
        f"{result['gradient']['relative_error']:.2f} against the exact one\n"
        f"steps to converge: median {result['steps']['median']:.0f}, most {result['steps']['most']}"
    )
    for line in result["advice"]:
        console.print(f"- {line}")
    console.print(f"residual traces: {picture}")
    return result


def _open(run: str, device: str) -> tuple[Path, Generator, dict[str, Any]]:
    folder = find_run(run)
    return folder, load(folder, device=device), read_config(folder)


def _images(config: dict[str, Any], split: Literal["train", "test"], data_dir: Path | None) -> torch.Tensor:
    channels = config["model"]["image_shape"][0]
    return load_images(config["data"], split, root=_text(data_dir), size=config.get("size"), channels=channels)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
