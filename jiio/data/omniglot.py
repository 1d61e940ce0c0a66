"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1623 characters, 20 drawings each, read from its two zip files."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SIDE = 28
DRAWERS = 20
FOLDERS = ("omniglot-py", "omniglot", ".")
FILES = {"background": "images_background.zip", "evaluation": "images_evaluation.zip"}
ENTRY = re.compile(r"images_(?:background|evaluation)/([^/]+)/(character\d+)/\d+_(\d+)\.png$")
TRAIN_CHARACTERS = 1200  # of the random split; the other 423 are for testing
Division = Literal["random", "original"]
Split = Literal["train", "test"]


def omniglot(split: Split, root: Path, *, division: Division = "random", seed: int = 0) -> Tensor:
    """Characters (characters, 20, 1, 28, 28), ink 1 on 0.

    division "random": 1200 characters for training and 423 for testing, drawn from all alphabets by `seed` (Vinyals et al.
    2016; MAML). "original": the 964 background and 659 evaluation characters, whose alphabets differ.
    `FileNotFoundError` where the zips are missing, `ValueError` for damaged ones.
    """
    if division == "original":
        return read_characters(_find("background" if split == "train" else "evaluation", root))
    if division != "random":
        raise ValueError(f"division must be 'random' or 'original', got {division!r}")
    every = torch.cat([read_characters(_find(part, root)) for part in FILES])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order[:TRAIN_CHARACTERS] if split == "train" else order[TRAIN_CHARACTERS:]]


def _find(part: str, root: Path) -> Path:
    for folder in FOLDERS:
        if (root / folder / FILES[part]).is_file():
            return root / folder / FILES[part]
    raise FileNotFoundError(f"no {FILES[part]} in {root / FOLDERS[0]}, {root / FOLDERS[1]} or {root}")


def read_characters(path: Path) -> Tensor:
    """The characters of one zip in the order of their names, (characters, 20, 1, 28, 28)."""
    drawings: dict[tuple[str, str], dict[int, np.ndarray[Any, Any]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if found := ENTRY.search(name):
                    alphabet, character, drawer = found.groups()
                    drawings.setdefault((alphabet, character), {})[int(drawer)] = _drawing(archive.read(name))
    except (zipfile.BadZipFile, UnidentifiedImageError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole zip of Omniglot's drawings: {error}") from error
    whole = [np.stack([by[d] for d in sorted(by)]) for by in drawings.values() if len(by) == DRAWERS]
    if not whole or len(whole) < len(drawings):
        raise ValueError(
            f"{path}: {len(drawings) - len(whole)} of {len(drawings)} characters have not {DRAWERS} drawings"
        )
    return torch.from_numpy(np.stack(whole))[:, :, None].float().div_(255)


def _drawing(content: bytes) -> np.ndarray[Any, Any]:
    """Ink 255 on 0, averaged down to 28x28."""
    with Image.open(io.BytesIO(content)) as picture:
        return 255 - np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
