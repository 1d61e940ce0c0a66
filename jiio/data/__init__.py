"""Readers of images: embedded digits, MNIST and its kin, CIFAR-10, faces, folders of files. Images are float32 in [0, 1]."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from torch import Tensor

from jiio.data.cifar import cifar10
from jiio.data.faces import celeba, faces64
from jiio.data.folder import folder_images
from jiio.data.idx import idx_images, idx_labels
from jiio.data.image import read_image, write_image
from jiio.data.omniglot import Division
from jiio.data.omniglot import omniglot as omniglot_characters  # its own name would hide the module

Split = Literal["train", "test"]
NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "faces64", "celeba", "folder:PATH")
CHARACTERS = ("omniglot", "digits")
LABELLED = ("digits", "mnist", "fashion-mnist", "cifar10")
__all__ = [
    "CHARACTERS",
    "LABELLED",
    "NAMES",
    "Split",
    "data_root",
    "load_characters",
    "load_images",
    "load_labels",
    "read_image",
    "resized",
    "write_image",
]


def data_root(root: str | Path | None) -> Path:
    """The folder of the data sets: `root`, or the environment variable JIIO_DATA_DIR."""
    chosen = root or os.environ.get("JIIO_DATA_DIR")
    if not chosen:
        raise FileNotFoundError("this data set lies on the disk: give its folder with --data-dir or JIIO_DATA_DIR")
    if not Path(chosen).is_dir():
        raise FileNotFoundError(f"the data folder {str(chosen)!r} does not exist")
    return Path(chosen)


def resized(name: str) -> bool:
    """Whether images of this data are scaled to a size that is chosen."""
    return name == "celeba" or name.startswith("folder:")


def load_images(
    name: str,
    split: Split,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    channels: int | None = None,
) -> Tensor:
    """Images (n, channels, height, width) in [0, 1].

    name: digits (embedded, 8x8), mnist, fashion-mnist (28x28), cifar10 (32x32), faces64 (64x64), celeba, folder:PATH.
    size: of celeba's images (64 by default) and a folder's (32).  channels: of a folder's, 3 by default.
    Raises `ValueError` for an unknown name or a damaged file, `FileNotFoundError` for missing data.

    >>> load_images("digits", "test").shape
    torch.Size([360, 1, 8, 8])
    """
    if name == "digits":
        from jiio.data.digits import digits_images

        return digits_images(split)
    if name in ("mnist", "fashion-mnist"):
        return idx_images(name, split, data_root(root))
    if name == "cifar10":
        return cifar10(split, data_root(root))[0]
    if name == "faces64":
        return faces64(split, data_root(root))
    if name == "celeba":
        return celeba(split, data_root(root), size=64 if size is None else size)
    if name.startswith("folder:"):
        side = 32 if size is None else size
        return folder_images(Path(name.removeprefix("folder:")), split, size=side, channels=channels or 3)
    raise ValueError(f"unknown data {name!r}: choose one of {', '.join(NAMES)}")


def load_labels(name: str, split: Split, *, root: str | Path | None = None) -> Tensor:
    """Labels (n,) as integers, in the order of `load_images`."""
    if name == "digits":
        from jiio.data.digits import digits_labels

        return digits_labels(split)
    if name in ("mnist", "fashion-mnist"):
        return idx_labels(name, split, data_root(root))
    if name == "cifar10":
        return cifar10(split, data_root(root))[1]
    raise ValueError(f"data {name!r} has no labels: choose one of {', '.join(LABELLED)}")


def load_characters(
    name: str, split: Split, *, root: str | Path | None = None, division: Division = "random"
) -> Tensor:
    """Classes for meta-learning, (classes, drawings, channels, height, width): omniglot (28x28), digits (embedded, 8x8).

    No class of one split is in the other. division: of Omniglot's characters.

    >>> load_characters("digits", "test").shape
    torch.Size([16, 174, 1, 8, 8])
    """
    if name == "digits":
        from jiio.data.digits import digits_characters

        return digits_characters(split)
    if name == "omniglot":
        return omniglot_characters(split, data_root(root), division=division)
    raise ValueError(f"data {name!r} has no classes to learn from a few of: choose one of {', '.join(CHARACTERS)}")
