"""Faces from sheets, and CelebA in the form of its owners, made up here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
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


def test_celeba_is_read_from_its_zip_where_it_is_not_unpacked(tmp_path: Path) -> None:
    celeba_files(tmp_path)
    unpacked = load_images("celeba", "train", root=tmp_path, size=16)
    aligned, zipped = tmp_path / "celeba" / "img_align_celeba", tmp_path / "celeba" / "img_align_celeba.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in aligned.iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
            path.unlink()
    aligned.rmdir()
    assert torch.equal(load_images("celeba", "train", root=tmp_path, size=16), unpacked)
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000009.jpg 0\n")
    with pytest.raises(FileNotFoundError, match=r"img_align_celeba.zip: .*000009.jpg"):
        load_images("celeba", "train", root=tmp_path)
    zipped.write_bytes(zipped.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"img_align_celeba.zip is not a whole zip"):
        load_images("celeba", "train", root=tmp_path)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_no_image_has_is_refused(tmp_path: Path, size: int) -> None:
    celeba_files(tmp_path)
    for name in ("celeba", f"folder:{tmp_path}"):
        with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
            load_images(name, "train", root=tmp_path, size=size)


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
