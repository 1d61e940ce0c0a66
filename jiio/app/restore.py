"""`jiio restore RUN IMAGE...`: restore a user's own image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from jiio.app.run_folder import UserError
from jiio.data import read_image, write_image
from jiio.models import Generator
from jiio.problem import State
from jiio.solution import Solution
from jiio.tasks.measurement import Identity, Mask, Measurement, damage, measure
from jiio.tasks.restoration import posterior_mean, restore

PICTURE = "restoration.png"  # beside the restored files


def read_images(paths: tuple[Path, ...], shape: tuple[int, int, int]) -> Tensor:
    """The files as images of `shape` (channels, height, width); refused when they have another size, or one name."""
    channels, height, width = shape
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise UserError(
            f"several of the files are called {twice[0]}, as their results would be: take them one after the other"
        )
    images = []
    for path in paths:
        image = read_image(path, channels=channels)
        if tuple(image.shape[1:]) != (height, width):
            raise UserError(
                f"{path} has {image.shape[2]}x{image.shape[1]} pixels, this model needs {width}x{height}: resize it first"
            )
        images.append(image)
    return torch.stack(images)


def damaged_measurement(images: Tensor, name: str, *, seed: int) -> Measurement:
    """Damage clean images by name."""
    operator, sigma = damage(name)
    return measure(operator, images, sigma=sigma, seed=seed)


def result_files(
    paths: Sequence[Path], folder: Path, kind: str, *, picture: str, spared: Sequence[Path] = ()
) -> list[Path]:
    """NAME-KIND.png in `folder` for each file; refused, before any work, where that is no folder, or where these or the
    `picture` there would replace one of the files or of the `spared` ones."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: --output names the folder that results are written to")
    results = [folder / f"{path.stem}-{kind}.png" for path in paths]
    given = {path.resolve() for path in (*paths, *spared)}
    for result in (*results, folder / picture):
        if result.resolve() in given:
            raise UserError(f"{result} would be replaced by a result: choose another folder with --output")
    return results


def given_measurement(images: Tensor, mask: Path | None, noise: float) -> Measurement:
    """Files that are damaged already: white pixels of `mask` are known, `noise` is the sigma on [0, 1]."""
    shape = (images.shape[1], images.shape[2], images.shape[3])
    if mask is None:
        return Measurement(Identity(), images, (), noise, shape)
    known = (read_image(mask, channels=1) > 0.5).to(images)
    if known.shape[1:] != images.shape[2:]:
        raise UserError(
            f"the mask {mask} has {known.shape[2]}x{known.shape[1]} pixels, the images {shape[2]}x{shape[1]}"
        )
    if not bool(known.any()):
        raise UserError(f"the mask {mask} is all black: no pixel is known (white = known)")
    operator = Mask(known)
    parameters = (known.expand(len(images), *known.shape),)
    return Measurement(operator, operator.apply(images, *parameters), parameters, noise, shape)


def restore_files(
    model: Generator, measurement: Measurement, targets: Sequence[Path]
) -> tuple[Tensor, Solution[State]]:
    """Write the posterior mean of each measured image to its target; the images and the solve behind them."""
    restored, solution = restore(model, measurement, on_failure="ignore")
    images = posterior_mean(model, restored, measurement).clamp(0, 1).cpu()
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    for target, image in zip(targets, images, strict=True):
        write_image(image, target)
    return images, solution
