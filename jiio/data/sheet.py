"""Sheets: one picture that holds many images of one size, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def read_sheet(path: Path, side: int) -> np.ndarray[Any, Any]:
    """The tiles of a sheet, row by row, (n, side, side, 3) of unsigned bytes."""
    try:
        with Image.open(path) as picture:
            sheet = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        if not path.exists():
            raise FileNotFoundError(f"no sheet {path}") from error
        raise ValueError(f"{path} is not a readable picture: {error}") from error
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    if sheet.shape[:2] != (rows * side, columns * side):
        raise ValueError(f"{path} of {sheet.shape[1]}x{sheet.shape[0]} does not divide into tiles of {side}")
    return sheet.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)


def as_images(tiles: np.ndarray[Any, Any]) -> Tensor:
    """Tiles as (n, 3, side, side) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float().div_(255)
