"""scikit-learn's handwritten digits: 1797 images of 8x8, embedded in that package."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

TRAIN = 1437  # four fifths; the rest are test images
TEST_DIGITS = (2, 3, 4, 7)
DRAWINGS = 174  # of the rarest digit


def _rows(split: Literal["train", "test"]) -> Tensor:
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return order[:TRAIN] if split == "train" else order[TRAIN:]


def digits_images(split: Literal["train", "test"]) -> Tensor:
    """(1437 or 360, 1, 8, 8) in [0, 1]; the split is fixed."""
    images = torch.from_numpy(_bunch().images).float() / 16
    return images[_rows(split), None]


def digits_labels(split: Literal["train", "test"]) -> Tensor:
    """(1437 or 360,), 0 to 9."""
    return torch.from_numpy(_bunch().target).long()[_rows(split)]


def digits_characters(split: Literal["train", "test"]) -> Tensor:
    """Classes for meta-learning, (classes, 174, 1, 8, 8): train, six digits; test, the other four and their rotations.

    Of 6 and 9, which are rotations of each other, neither is among the test classes.
    """
    images, labels = torch.from_numpy(_bunch().images).float() / 16, torch.from_numpy(_bunch().target)
    chosen = [digit for digit in range(10) if (digit in TEST_DIGITS) == (split == "test")]
    classes = torch.stack([images[labels == digit][:DRAWINGS, None] for digit in chosen])
    if split == "train":
        return classes
    return torch.cat([torch.rot90(classes, turns, dims=(-2, -1)) for turns in range(4)])


def _bunch() -> Any:
    from sklearn.datasets import load_digits  # a second of start-up, which most commands need not pay

    return load_digits()
