"""CIFAR-10 from sheets, from the official batches and from their archive; files that are not what they say."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jiio.data import load_images, load_labels

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9]


def official(folder: Path) -> Path:
    """The official layout, each of the five training batches with the same six images."""
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": PIXELS.reshape(6, -1), b"labels": LABELS, b"batch_label": b"made up"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def sheets(folder: Path) -> None:
    folder.mkdir(parents=True)
    tiles = PIXELS.transpose(0, 2, 3, 1).reshape(2, 3, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(64, 96, 3)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        Image.fromarray(tiles).save(folder / f"{name}.webp", lossless=True)
    np.savez(folder / "labels.npz", train=np.array(LABELS * 5, np.uint8), test=np.array(LABELS, np.uint8))


@pytest.mark.parametrize("kind", ["unpacked", "archive", "sheets"])
def test_all_forms_give_the_same_images(tmp_path: Path, kind: str) -> None:
    if kind == "sheets":
        sheets(tmp_path / "cifar10")
    else:
        folder = official(tmp_path / "cifar-10-batches-py")
        if kind == "archive":
            with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
                archive.add(folder, "cifar-10-batches-py")
            for file in folder.iterdir():
                file.unlink()
    images = load_images("cifar10", "test", root=tmp_path)
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(PIXELS))
    assert load_labels("cifar10", "test", root=tmp_path).tolist() == LABELS
    assert load_images("cifar10", "train", root=tmp_path).shape == (30, 3, 32, 32)
    assert load_labels("cifar10", "train", root=tmp_path).tolist() == LABELS * 5


def test_batches_are_read_as_python_2_and_an_old_numpy_wrote_them(tmp_path: Path) -> None:
    """The official files: byte strings, and numpy's functions under the names of that time."""
    folder, data = official(tmp_path / "cifar-10-batches-py"), PIXELS.tobytes()
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x06M\x00\x0ct" + dtype
    array += b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    (folder / "test_batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u.")
    images = load_images("cifar10", "test", root=tmp_path)
    assert torch.equal((images * 255).round().byte(), torch.from_numpy(PIXELS))
    assert load_labels("cifar10", "test", root=tmp_path).tolist() == LABELS


class Malicious:
    def __reduce__(self):
        return (print, ("run by unpickling",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = official(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Malicious(), b"labels": []}))
    with pytest.raises(ValueError, match="no CIFAR-10 batch contains"):
        load_images("cifar10", "test", root=tmp_path)
    assert "run by unpickling" not in capsys.readouterr().out


def test_damaged_and_missing_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no CIFAR-10"):
        load_images("cifar10", "train", root=tmp_path)
    folder = official(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole CIFAR-10 batch"):
        load_images("cifar10", "test", root=tmp_path)
    for batch in ({b"data": PIXELS.reshape(6, -1), b"labels": LABELS[:5]}, {b"data": [1], b"labels": [1]}):
        (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
        with pytest.raises(ValueError, match="does not hold images of 32x32 and a label for each"):
            load_images("cifar10", "test", root=tmp_path)
    sheets(tmp_path / "cifar10")
    (tmp_path / "cifar10" / "test_batch.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="not a readable picture"):
        load_images("cifar10", "test", root=tmp_path)
