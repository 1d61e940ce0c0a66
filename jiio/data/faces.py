"""Faces: sheets of 64x64 crops, and CelebA (Liu et al. 2015) as its owners distribute it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from jiio.data.image import open_image, to_tensor
from jiio.data.sheet import as_images, read_sheet

SIDE = 64
Split = Literal["train", "test"]
ALIGNED, PARTITION = "img_align_celeba", "list_eval_partition.txt"
PARTS = {"train": "0", "test": "2"}  # 1 is the validation part


def faces64(split: Split, root: Path) -> Tensor:
    """The tiles of ROOT/faces64/train.jpg or test.jpg, (n, 3, 64, 64) in [0, 1]."""
    return as_images(read_sheet(root / "faces64" / f"{split}.jpg", SIDE))


def celeba(split: Split, root: Path, *, size: int = SIDE) -> Tensor:
    """The aligned images of a split, cropped to their central square and scaled, (n, 3, size, size) in [0, 1].

    Reads ROOT/celeba/img_align_celeba.zip, or what was unpacked from it there, and ROOT/celeba/list_eval_partition.txt.
    All images of the training split at 64x64 take 8 GB.
    """
    folder = root / "celeba"
    if not (folder / PARTITION).is_file():
        raise FileNotFoundError(f"no CelebA in {root}: expected celeba/{PARTITION} and celeba/{ALIGNED}.zip")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    names = _names(folder / PARTITION, PARTS[split])
    pixels = torch.empty(len(names), 3, size, size)
    with _aligned(folder) as opened:
        for row, name in zip(pixels, names, strict=True):
            row.copy_(to_tensor(ImageOps.fit(opened(name), (size, size), Image.Resampling.LANCZOS)))
    return pixels


@contextmanager
def _aligned(folder: Path) -> Iterator[Callable[[str], Image.Image]]:
    """What opens an aligned image by its name: in the unpacked folder, or in the zip where there is none."""
    zipped = folder / f"{ALIGNED}.zip"
    if (folder / ALIGNED).is_dir() or not zipped.is_file():
        yield lambda name: open_image(folder / ALIGNED / name, channels=3)
        return
    try:
        with zipfile.ZipFile(zipped) as archive:
            yield lambda name: open_image(zipped / name, channels=3, content=archive.read(f"{ALIGNED}/{name}"))
    except KeyError as error:
        raise FileNotFoundError(f"{zipped}: {error.args[0]}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{zipped} is not a whole zip: {error}") from error


def _names(partition: Path, part: str) -> list[str]:
    lines = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    wrong = next((line for line in lines if len(line) != 2 or line[1] not in ("0", "1", "2")), None)
    if wrong is not None:
        raise ValueError(f"{partition} has a line {' '.join(wrong)!r}: expected a file name and 0, 1 or 2")
    names = [name for name, number in lines if number == part]
    if not names:
        raise ValueError(f"{partition} names no image of part {part}")
    return names
