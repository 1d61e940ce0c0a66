"""Faces: sheets of 64x64 crops, and CelebA (Liu et al. 2015) as its owners distribute it."""

from __future__ import annotations

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

    Reads ROOT/celeba/img_align_celeba/*.jpg (unpack img_align_celeba.zip there) and ROOT/celeba/list_eval_partition.txt.
    All images of the training split at 64x64 take 8 GB.
    """
    folder = root / "celeba"
    if not (folder / PARTITION).is_file():
        raise FileNotFoundError(f"no CelebA in {root}: expected celeba/{PARTITION} and celeba/{ALIGNED}/")
    files = [folder / ALIGNED / name for name in _names(folder / PARTITION, PARTS[split])]
    pixels = torch.empty(len(files), 3, size, size)
    for row, path in zip(pixels, files, strict=True):
        row.copy_(to_tensor(ImageOps.fit(open_image(path, channels=3), (size, size), Image.Resampling.LANCZOS)))
    return pixels


def _names(partition: Path, part: str) -> list[str]:
    lines = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    wrong = next((line for line in lines if len(line) != 2 or line[1] not in ("0", "1", "2")), None)
    if wrong is not None:
        raise ValueError(f"{partition} has a line {' '.join(wrong)!r}: expected a file name and 0, 1 or 2")
    names = [name for name, number in lines if number == part]
    if not names:
        raise ValueError(f"{partition} names no image of part {part}")
    return names
