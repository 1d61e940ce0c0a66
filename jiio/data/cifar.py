"""CIFAR-10 (Krizhevsky 2009): the official python archive, unpacked or not, or lossless sheets of the same images.

A sheet is one picture of 10 000 images of 32x32, a hundred a row, with the labels of all sheets in labels.npz (arrays
`train` and `test`). The official files are pickles: read without letting them name anything but numpy's arrays.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jiio.data.sheet import as_images, read_sheet

SIDE = 32
FOLDERS = ("cifar10", "cifar-10-batches-py", ".")
ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
Split = Literal["train", "test"]


class _Arrays(pickle.Unpickler):
    """An unpickler of plain values and numpy arrays; anything else is refused, so a file can't run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(f"the file asks for {module}.{name}, which no CIFAR-10 batch contains: not read")
        return super().find_class(module, name)


def cifar10(split: Split, root: Path) -> tuple[Tensor, Tensor]:
    """Images (50 000 or 10 000, 3, 32, 32) in [0, 1] and labels, in the official order.

    Looks in ROOT/cifar10, ROOT/cifar-10-batches-py and ROOT for sheets, unpacked batches or the archive.
    `FileNotFoundError` where there are none, `ValueError` for damaged ones.
    """
    for folder in (root / name for name in FOLDERS):
        if (folder / "labels.npz").is_file():
            return _sheets(split, folder)
        if (folder / BATCHES[split][0]).is_file():
            return _official(_decode((folder / name).read_bytes(), folder / name) for name in BATCHES[split])
        if (folder / ARCHIVE).is_file():
            return _archive(split, folder / ARCHIVE)
    raise FileNotFoundError(
        f"no CIFAR-10 in {root}: expected cifar10/labels.npz with sheets, cifar-10-batches-py/ or {ARCHIVE}"
    )


def _sheets(split: Split, folder: Path) -> tuple[Tensor, Tensor]:
    try:
        labels = np.load(folder / "labels.npz", allow_pickle=False)[split]
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder / 'labels.npz'} holds no labels {split!r}: {error}") from error
    images = np.concatenate([read_sheet(folder / f"{name}.webp", SIDE) for name in BATCHES[split]])
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {split} images but {len(labels)} labels")
    return as_images(images), torch.from_numpy(labels.astype(np.int64))


def _archive(split: Split, path: Path) -> tuple[Tensor, Tensor]:
    try:
        with tarfile.open(path) as archive:
            parts = []
            for name in BATCHES[split]:
                member = archive.extractfile(f"cifar-10-batches-py/{name}")
                if member is None:
                    raise ValueError(f"{path} holds no file {name}")
                parts.append(_decode(member.read(), path))
    except (tarfile.TarError, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"{path} is not a whole CIFAR-10 archive: {error}") from error
    return _official(parts)


# a damaged pickle calls what it names with anything
DAMAGED = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def _decode(content: bytes, path: Path) -> dict[Any, Any]:
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
    except DAMAGED as error:
        raise ValueError(f"{path} is not a whole CIFAR-10 batch: {error}") from error
    if not isinstance(batch, dict) or b"data" not in batch or b"labels" not in batch:
        raise ValueError(f"{path} holds no data and labels")
    pixels, labels = batch[b"data"], batch[b"labels"]
    form = (len(labels), 3 * SIDE * SIDE) if isinstance(labels, list) else None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != form:
        raise ValueError(f"{path} does not hold images of {SIDE}x{SIDE} and a label for each")
    return batch


def _official(batches: Any) -> tuple[Tensor, Tensor]:
    found = list(batches)
    pixels = np.concatenate([batch[b"data"] for batch in found]).reshape(-1, 3, SIDE, SIDE)
    labels = torch.tensor([label for batch in found for label in batch[b"labels"]])
    return torch.from_numpy(pixels).float().div_(255), labels
