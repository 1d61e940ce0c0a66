"""The idx format of MNIST (LeCun, Cortes, Burges) and Fashion-MNIST (Xiao, Rasul, Vollgraf), plain or gzipped."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
PREFIX = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 8


def read_idx(path: Path) -> Tensor:
    """The array of an idx file of unsigned bytes; `ValueError` when it is damaged."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(">" + "I" * content[3], content[4:start])
    if len(content) - start != int(np.prod(shape)):
        raise ValueError(f"{path} should hold {shape} values, but has {len(content) - start} bytes of them")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def find_idx(name: str, file: str, root: Path) -> Path:
    """`file`, plain or gzipped, in ROOT/NAME/raw, ROOT/NAME or ROOT itself."""
    for folder in (root / FOLDERS[name] / "raw", root / FOLDERS[name], root):
        for suffix in ("", ".gz"):
            if (folder / (file + suffix)).is_file():
                return folder / (file + suffix)
    raise FileNotFoundError(f"no {file}[.gz] in {root / FOLDERS[name] / 'raw'}, {root / FOLDERS[name]} or {root}")


def idx_images(name: str, split: Literal["train", "test"], root: Path) -> Tensor:
    """(n, 1, height, width) in [0, 1]."""
    path = find_idx(name, f"{PREFIX[split]}-images-idx3-ubyte", root)
    images = read_idx(path)
    if images.dim() != 3:
        raise ValueError(f"{path} holds {images.dim()}-dimensional data, not images")
    return images[:, None].float() / 255


def idx_labels(name: str, split: Literal["train", "test"], root: Path) -> Tensor:
    """(n,)."""
    return read_idx(find_idx(name, f"{PREFIX[split]}-labels-idx1-ubyte", root)).long()
