"""The commands' options, and what each does with them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from jiio.app.run_folder import RunFolder, UserError, user_input
from jiio.app.table import console
from jiio.app.training import Trainable, open_run, run_training
from jiio.data import load_images
from jiio.load import Model, find_run, load, read_config
from jiio.models import Generator
from jiio.tasks.generation import PRIOR

Positional = tyro.conf.Positional
SHOWN = 10  # images in a picture


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
class WithData(Common):
    """Options of commands that read data sets."""

    data_dir: Path | None = None
    """Folder that holds the data sets; the environment variable JIIO_DATA_DIR otherwise."""


@dataclass(frozen=True)
class WithRun(WithData):
    """Options of every training."""

    output: Path | None = None
    """Run folder; a folder under runs/ named after task, data and seed otherwise."""
    resume: bool = False
    """Go on from the last checkpoint of the same command."""
    overwrite: bool = False
    """Delete the run that the folder holds already."""


@dataclass(frozen=True)
class Train(WithRun):
    """Options of every training from the start."""

    cell: Literal["well_posed", "mdeq"] = "well_posed"
    """well_posed is a contraction by construction; mdeq is the paper's cell."""


@dataclass(frozen=True)
class Demo(Common):
    """Train a generator on scikit-learn's digits (about a minute), restore damaged test images, print a table.

    Example: jiio demo
    """

    output: Path = Path("runs/demo")
    """Folder for report.json and restoration.png."""
    steps: int = 400
    """Optimiser steps of the training."""


def demo(options: Demo) -> dict[str, Any]:
    """`jiio demo`."""
    from jiio.app.demo import demo as run

    return run(options.output, seed=options.seed, steps=options.steps)


@dataclass(frozen=True)
class TrainGeneration(Train):
    """Train a generator of images by joint latent optimisation. Ctrl-C saves; --resume goes on.

    Example: jiio train generation --data mnist --data-dir DATA
    """

    data: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, faces64, celeba, or folder:PATH for a folder of images."""
    latent: int | None = None
    """Entries of the latent vector; 16, 32 or 64 by the images' size otherwise."""
    size: int | None = None
    """Side to which images of celeba (64 otherwise) and of a folder (32) are resized."""
    steps: int = 1500
    """Optimiser steps."""
    images: int = 16384
    """Training images used, chosen by the seed; 0 for all."""
    batch: int = 64
    """Images a step."""
    joint_steps: int = 20
    """Joint steps of the inner solve of a batch."""
    learning_rate: float = 1e-3
    """Of Adam, at its highest."""
    jacobian: float | None = None
    """Weight of the Jacobian penalty; 1.0 for mdeq, 0 for well_posed otherwise."""


def train_generation(options: TrainGeneration) -> dict[str, Any]:
    """`jiio train generation`."""
    from jiio.app.train_generation import Training, default_folder, make_trainer

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
        data_dir=text(options.data_dir),
        latent=options.latent,
        cell=options.cell,
        size=options.size,
        device=options.device,
    )
    return train(options, trainer, config, default=default_folder(options.data, options.seed))


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
    """Damage clean files first: hole, pixels, blur, downsample, superresolution, or noise-0.2 (any level,
    on the scale [-1, 1])."""
    mask: Path | None = None
    """For files that are damaged already: an image of the same size, white where pixels are known."""
    noise: float = 0.0
    """For files that are damaged already: the noise's standard deviation, pixels in [0, 1]."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("restored")
    """Folder for the restored files and a picture beside the originals."""


def restore(options: Restore) -> dict[str, Any]:
    """`jiio restore RUN IMAGE...`."""
    from jiio.app.figure import image_grid
    from jiio.app.restore import damaged_measurement, given_measurement, read_images, restore_files, to_device

    if not options.images:
        raise UserError("name at least one image file")
    if options.noise < 0:
        raise UserError(f"--noise must not be negative, got {options.noise}")
    if options.damage and (options.mask or options.noise):
        raise UserError("--damage is for clean files, --mask and --noise for damaged ones: give one or the other")
    _, model, _ = open_generator(options.run, options.device)
    device = options.device
    with user_input():
        images = read_images(options.images, model.config.image_shape)
        if options.damage:
            measurement = damaged_measurement(images, options.damage, seed=options.seed)
        else:
            measurement = given_measurement(images, options.mask, options.noise)
    written, restored, converged = restore_files(model, options.images, to_device(measurement, device), options.output)
    shown = (("clean", images), ("damaged", measurement.y), ("restored", restored))
    rows = [(label, some[:SHOWN], None) for label, some in shown]
    picture = image_grid(rows if options.damage else rows[1:], options.output / "restoration.png")
    for path, good in zip(written, converged.tolist(), strict=True):
        console.print(f"{path}" + ("" if good else "  [yellow](the solve did not converge)[/]"))
    console.print(f"side by side: {picture}")
    return {"files": [str(path) for path in written], "picture": str(picture), "converged": converged.tolist()}


@dataclass(frozen=True, kw_only=True)
class Diagnose(WithData):
    """Explain how the inner solve of a model behaves and what to change: contraction, curvature, lag, gradient error.

    Example: jiio diagnose digits-generator
    """

    run: Positional[str]
    """Run folder or the name of a packaged model."""
    images: int = 32
    """Test images to look at."""
    picture: Path | None = None
    """Picture of the residuals; diagnose.png in the run folder otherwise."""


def diagnose(options: Diagnose) -> dict[str, Any]:
    """`jiio diagnose RUN`."""
    from jiio.app.diagnose import describe
    from jiio.app.diagnose import diagnose as run

    folder, model, config = open_generator(options.run, options.device)
    images = images_of(config, "test", options.data_dir)[: options.images]
    writable = own_run(folder)
    picture = options.picture or (folder if writable else Path(".")) / "diagnose.png"
    result = run(
        model, images.to(options.device), prior=config.get("training", {}).get("prior", PRIOR), picture=picture
    )
    for line in describe(result):
        console.print(line)
    console.print(f"residual traces: {picture}")
    return result


@dataclass(frozen=True, kw_only=True)
class Sample(WithData):
    """Draw new images from the density of a generator's latents, and interpolate between test images.

    Example: jiio sample mnist-generator --data-dir DATA
    """

    run: Positional[str] = "digits-generator"
    """Run folder or the name of a packaged model."""
    rows: int = 6
    """Rows of ten images."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("samples")
    """Folder for samples.png and interpolation.png."""


def sample(options: Sample) -> dict[str, Any]:
    """`jiio sample RUN`."""
    from jiio.app.sample import sample as run

    if options.rows < 1:
        raise UserError(f"--rows must be at least 1, got {options.rows}")
    _, model, config = open_generator(options.run, options.device)
    test = images_of(config, "test", options.data_dir)
    found = run(model, test, rows=options.rows, seed=options.seed, output=options.output)
    console.print(f"pictures: {' and '.join(found['pictures'])}")
    return found


def train(options: WithRun, trainer: Trainable, config: dict[str, Any], *, default: Path) -> dict[str, Any]:
    """A training under a progress bar, from the start or from the run's last checkpoint."""
    from jiio.app.progress import steps_bar

    folder = RunFolder(options.output or default)
    for problem in open_run(folder, trainer, config, resume=options.resume, overwrite=options.overwrite):
        console.print(f"[yellow]skipped a damaged checkpoint: {problem}[/]")
    console.print("Ctrl-C saves and leaves")
    steps_bar(run_training(folder, trainer), total=trainer.steps, label="training", done=trainer.step)
    console.print(f"wrote {folder.path}; next: jiio evaluate {folder.path}")
    return {"run": str(folder.path), "steps": trainer.step}


def open_generator(run: str, device: str) -> tuple[Path, Generator, dict[str, Any]]:
    """(folder, model, configuration) of a generator's run; `UserError` for another one."""
    folder, model, config = open_model(run, device)
    if not isinstance(model, Generator):
        raise UserError(f"{folder} is a run of {config['task']}, not of a generator")
    return folder, model, config


def open_model(run: str, device: str) -> tuple[Path, Model, dict[str, Any]]:
    """(folder, model, configuration) of a run."""
    with user_input():
        folder = find_run(run)
        return folder, load(folder, device=device), read_config(folder)


def images_of(config: dict[str, Any], split: Literal["train", "test"], data_dir: Path | None) -> torch.Tensor:
    """The images that a generator's run was trained on, or its test images."""
    channels = config["model"]["image_shape"][0]
    with user_input():
        return load_images(config["data"], split, root=text(data_dir), size=config.get("size"), channels=channels)


def own_run(folder: Path) -> bool:
    """Whether a folder is a run of the user's, to write into, and not a model of the package."""
    return (folder / "metrics.jsonl").exists()


def text(path: Path | None) -> str | None:
    """A path as a string."""
    return None if path is None else str(path)
