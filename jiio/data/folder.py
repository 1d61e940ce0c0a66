"""Any folder of image files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from jiio.data.image import open_image, to_tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEST_SHARE = 0.1


def folder_files(folder: Path, split: Literal["train", "test"]) -> list[Path]:
    """The image files below `folder`, sorted; a file's split is decided by a hash of its name, so that adding files
    moves none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no image files in {str(folder)!r} (looked for {', '.join(sorted(SUFFIXES))})")
    chosen = [path for path in files if _is_test(path.relative_to(folder)) == (split == "test")]
    if not chosen:
        raise ValueError(f"{len(files)} images in {str(folder)!r} are too few: none fell into the {split} split")
    return chosen


def _is_test(name: Path) -> bool:
    digest = hashlib.sha256(name.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64


def folder_images(folder: Path, split: Literal["train", "test"], *, size: int, channels: int) -> Tensor:
    """(n, channels, size, size): each image scaled (Lanczos) to cover the square and cropped at its centre."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return torch.stack(
        [
            to_tensor(ImageOps.fit(open_image(path, channels=channels), (size, size), Image.Resampling.LANCZOS))
            for path in folder_files(folder, split)
        ]
    )
