"""The commands' options, and what each does with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from jiio.app.run_folder import UserError, user_input
from jiio.app.table import console, counted
from jiio.app.team import cpu_share
from jiio.data import load_characters, load_images
from jiio.load import Model, find_run, load, read_config
from jiio.models import VAE, Classifier, ContextClassifier, Generator
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
    threads: int = field(default_factory=cpu_share)
    """CPU threads of a process; set explicitly for timings."""
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
    accumulate: int = 1
    """Parts in which each process computes its share of a step, one after the other, to save memory."""
    checkpoint_every: int = 200
    """Steps between checkpoints, of which the last two are kept."""
    tensorboard: bool = False
    """Also write the figures for TensorBoard (pip install 'jiio[tensorboard]')."""


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
    steps: int = 300
    """Optimiser steps of the training."""


def demo(options: Demo) -> dict[str, Any]:
    """`jiio demo`."""
    from jiio.app.demo import demo as run

    return run(options.output, seed=options.seed, steps=options.steps)


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
    from jiio.app.restore import (
        PICTURE,
        damaged_measurement,
        given_measurement,
        read_images,
        restore_files,
        result_files,
    )

    if not options.images:
        raise UserError("name at least one image file")
    if not 0 <= options.noise < math.inf:
        raise UserError(f"--noise must be finite and must not be negative, got {options.noise}")
    if options.damage and (options.mask or options.noise):
        raise UserError("--damage is for clean files, --mask and --noise for damaged ones: give one or the other")
    _, model, _ = open_generator(options.run, options.device)
    if not (options.damage or options.mask or options.noise):
        raise UserError("say what is damaged: --mask, --noise or both, or --damage for clean files")
    masks = [options.mask] if options.mask else []
    written = result_files(options.images, options.output, "restored", picture=PICTURE, spared=masks)
    with user_input():
        images = read_images(options.images, model.config.image_shape)
        if options.damage:
            measurement = damaged_measurement(images, options.damage, seed=options.seed)
        else:
            measurement = given_measurement(images, options.mask, options.noise)
    restored, solution = restore_files(model, measurement.to(options.device), written)
    shown = (("clean", images), ("damaged", measurement.y), ("restored", restored))
    rows = [(label, some[:SHOWN], None) for label, some in shown]
    picture = image_grid(rows if options.damage else rows[1:], options.output / PICTURE)
    converged = solution.converged
    for path, good in zip(written, converged.tolist(), strict=True):
        console.print(f"{path}" + ("" if good else "  [yellow](the solve did not converge)[/]"))
    steps = counted(int(solution.steps.max()), "joint step")
    console.print(f"{int(converged.sum())} of {len(converged)} converged, after at most {steps}")
    console.print(f"side by side: {picture}")
    return {"files": [str(path) for path in written], "picture": str(picture), "converged": converged.tolist()}


@dataclass(frozen=True, kw_only=True)
class Diagnose(WithData):
    """Explain how the inner solve of a model behaves and what to change: contraction, curvature, lag, how the latents lie,
    gradient error.

    Example: jiio diagnose digits-generator
    """

    run: Positional[str]
    """Run folder or the name of a packaged model."""
    images: int = 32
    """Test images to look at; 0 for all."""
    picture: Path | None = None
    """Picture of the residuals; diagnose.png in the run folder otherwise."""


def diagnose(options: Diagnose) -> dict[str, Any]:
    """`jiio diagnose RUN`."""
    from jiio.app.diagnose import describe
    from jiio.app.diagnose import diagnose as run

    folder, model, config = open_generator(options.run, options.device)
    images = images_of(config, "test", options.data_dir)
    images = images[: options.images or len(images)]
    writable = own_run(folder)
    picture = options.picture or (folder if writable else Path(".")) / "diagnose.png"
    prior = config.get("training", {}).get("prior", PRIOR)
    result = run(model, images.to(options.device), prior=prior, seed=options.seed, picture=picture)
    for line in describe(result):
        console.print(line)
    console.print(f"residual traces: {picture}")
    return result


def open_generator(run: str, device: str) -> tuple[Path, Generator, dict[str, Any]]:
    """(folder, model, configuration) of a run of a generator or of a VAE, whose decoder is one; `UserError` for another."""
    folder, found, found_config = open_model(run, device)
    model, config = as_generator(found, found_config)
    if not isinstance(model, Generator):
        raise UserError(f"{folder} is a run of {config['task']}, not of a generator")
    return folder, model, config


def open_model(run: str, device: str) -> tuple[Path, Model, dict[str, Any]]:
    """(folder, model, configuration) of a run."""
    with user_input():
        folder = find_run(run)
        return folder, load(folder, device=device), read_config(folder)


def as_generator(
    model: Model, config: dict[str, Any]
) -> tuple[Generator | Classifier | ContextClassifier, dict[str, Any]]:
    """A VAE as its decoder, with the prior of latents that its pixel variance makes of N(0, 1); other models as they are."""
    if not isinstance(model, VAE):
        return model, config
    return model.generator, config | {"training": config.get("training", {}) | {"prior": float(model.pixel_variance)}}


def images_of(config: dict[str, Any], split: Literal["train", "test"], data_dir: Path | None) -> torch.Tensor:
    """The images that a generator's run was trained on, or its test images."""
    channels = config["model"]["image_shape"][0]
    with user_input():
        return load_images(config["data"], split, root=text(data_dir), size=config.get("size"), channels=channels)


def characters_of(config: dict[str, Any], split: Literal["train", "test"], data_dir: Path | None) -> torch.Tensor:
    """The classes that a meta-trained run learnt from, or those it has not seen."""
    with user_input():
        division = config.get("training", {}).get("division", "random")
        return load_characters(config["data"], split, root=text(data_dir), division=division)


def own_run(folder: Path) -> bool:
    """Whether a folder is a run of the user's, to write into, and not a model of the package."""
    return (folder / "metrics.jsonl").exists()


def text(path: Path | None) -> str | None:
    """A path as a string."""
    return None if path is None else str(path)
