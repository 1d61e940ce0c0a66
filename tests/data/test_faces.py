"""Faces from sheets, and CelebA in the form of its owners, made up here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jiio.data import load_images


def celeba_files(root: Path, partition: str = "000001.jpg 0\n000002.jpg 2\n000003.jpg 1\n000004.jpg 0\n") -> None:
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    for k in range(1, 5):
        Image.new("RGB", (178, 218), (60 * k, 0, 0)).save(folder / "img_align_celeba" / f"{k:06d}.jpg", quality=100)
    (folder / "list_eval_partition.txt").write_text(partition)


def test_celeba_follows_its_partition(tmp_path: Path) -> None:
    celeba_files(tmp_path)
    train, test = (load_images("celeba", split, root=tmp_path, size=16) for split in ("train", "test"))
    assert train.shape == (2, 3, 16, 16) and test.shape == (1, 3, 16, 16)
    reds = [float(image[0].mean()) * 255 for image in (*train, *test)]
    assert reds == pytest.approx([60, 240, 120], abs=3)


def test_celeba_that_is_not_there_or_not_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected celeba"):
        load_images("celeba", "train", root=tmp_path)
    celeba_files(tmp_path, "000001.jpg train\n")
    with pytest.raises(ValueError, match="expected a file name and 0, 1 or 2"):
        load_images("celeba", "train", root=tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000009.jpg 0\n")
    with pytest.raises(FileNotFoundError, match="000009"):
        load_images("celeba", "train", root=tmp_path)


def test_a_sheet_of_faces_is_read_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "faces64").mkdir()
    tiles = np.repeat(np.arange(6, dtype=np.uint8) * 40, 64 * 64 * 3).reshape(2, 3, 64, 64, 3)
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(128, 192, 3)
    Image.fromarray(sheet).save(tmp_path / "faces64" / "test.jpg", quality=100)
    images = load_images("faces64", "test", root=tmp_path)
    assert images.shape == (6, 3, 64, 64)
    assert (images.mean((1, 2, 3)) * 255).tolist() == pytest.approx([0, 40, 80, 120, 160, 200], abs=2)
    with pytest.raises(FileNotFoundError, match="no sheet"):
        load_images("faces64", "train", root=tmp_path)
