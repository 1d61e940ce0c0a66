from __future__ import annotations

import gzip
import hashlib
import os
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jiio.data import load_images, load_labels, read_image, write_image
from jiio.data.download import download_mnist
from jiio.data.folder import folder_files


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">BBBB" + "I" * values.ndim, 0, 0, 8, values.ndim, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A made-up data folder: Fashion-MNIST gzipped, MNIST plain."""
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    write_idx(tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "FashionMNIST/raw/train-labels-idx1-ubyte.gz", np.array([3, 1, 4]))
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", images)
    return tmp_path


def test_digits_are_split_once_and_for_all() -> None:
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert train.shape == (1437, 1, 8, 8)
    assert test.shape == (360, 1, 8, 8)
    assert float(train.min()) == 0 and float(train.max()) == 1
    assert len(load_labels("digits", "test")) == 360
    both = {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}
    assert not both


def test_fashion_mnist_is_read_like_mnist(root: Path) -> None:
    images = load_images("fashion-mnist", "train", root=root)
    assert images.shape == (3, 1, 28, 28)
    assert float(images[0, 0, 0, 5]) == pytest.approx(5 / 255)
    assert load_labels("fashion-mnist", "train", root=root).tolist() == [3, 1, 4]
    assert load_images("mnist", "test", root=root).shape == (3, 1, 28, 28)


def test_the_environment_names_the_data_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JIIO_DATA_DIR", str(root))
    assert len(load_images("mnist", "test")) == 3
    monkeypatch.delenv("JIIO_DATA_DIR")
    with pytest.raises(FileNotFoundError, match="--data-dir or JIIO_DATA_DIR"):
        load_images("mnist", "test")


def test_damaged_files_are_named(root: Path) -> None:
    file = root / "MNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"t10k-images.* should hold \(3, 28, 28\)"):
        load_images("mnist", "test", root=root)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not an idx file"):
        load_images("mnist", "test", root=root)
    zipped = root / "FashionMNIST/raw/train-images-idx3-ubyte.gz"
    zipped.write_bytes(zipped.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        load_images("fashion-mnist", "train", root=root)
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte"):
        load_images("mnist", "train", root=root)
    with pytest.raises(ValueError, match="unknown data 'cats': choose one of digits"):
        load_images("cats", "train")


def test_a_folder_is_cropped_and_split_by_name(tmp_path: Path) -> None:
    for i in range(40):
        colour = tuple(int(v) for v in np.random.default_rng(i).integers(0, 255, 3))
        Image.new("RGB", (20, 12), colour).save(tmp_path / f"{i}.png")
    train = load_images(f"folder:{tmp_path}", "train", size=8)
    test = load_images(f"folder:{tmp_path}", "test", size=8)
    assert train.shape[1:] == (3, 8, 8)
    assert len(train) + len(test) == 40
    assert load_images(f"folder:{tmp_path}", "train", size=8, channels=1).shape[1] == 1
    before = folder_files(tmp_path, "test")
    Image.new("RGB", (20, 12)).save(tmp_path / "another.png")
    assert set(before) <= set(folder_files(tmp_path, "test"))


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image files in"):
        load_images(f"folder:{tmp_path}", "train")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_images(f"folder:{tmp_path / 'none'}", "train")
    for i in range(30):
        (tmp_path / f"broken{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.*is not a readable image"):
        load_images(f"folder:{tmp_path}", "train")


def test_images_survive_a_round_trip(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    write_image(image, tmp_path / "a.png")
    assert float((read_image(tmp_path / "a.png", channels=3) - image).abs().max()) < 1 / 255
    assert read_image(tmp_path / "a.png", channels=1).shape == (1, 5, 7)
    with pytest.raises(FileNotFoundError, match="no image file"):
        read_image(tmp_path / "b.png", channels=1)


@pytest.mark.parametrize(
    "mode, suffix", [("I;16", "png"), ("I;16", "tif"), ("L", "png"), ("P", "gif"), ("RGBA", "webp")]
)
def test_a_grey_ramp_is_the_same_in_every_mode(mode: str, suffix: str, tmp_path: Path) -> None:
    ramp, file = np.arange(48).reshape(6, 8) * 5, tmp_path / f"ramp.{suffix}"
    picture = Image.fromarray((ramp * 257).astype(np.uint16) if mode == "I;16" else ramp.astype(np.uint8))
    (picture if mode == "I;16" else picture.convert(mode)).save(file, lossless=True)
    for channels in (1, 3):
        found = read_image(file, channels=channels)
        assert float((found - torch.from_numpy(ramp / 255)).abs().max()) < 1.5 / 255


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_photograph_taken_with_a_turned_camera_is_upright(suffix: str, tmp_path: Path) -> None:
    """Orientation 6: the pixels' top row is the scene's right side. Pillow turns a TIFF by itself: not twice."""
    upright, file = np.zeros((16, 24), np.uint8), tmp_path / f"turned.{suffix}"
    upright[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    compression = {"compression": "tiff_lzw"} if suffix == "tif" else {}
    Image.fromarray(np.rot90(upright)).save(file, exif=exif, **compression)
    for channels in (1, 3):
        found = read_image(file, channels=channels)
        assert found.shape == (channels, 16, 24)
        assert float((found - torch.from_numpy(upright / 255)).abs().max()) < 0.05


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "gif"), ("L", "png"), ("RGBA", "webp")])
def test_transparent_pixels_are_refused_and_an_alpha_channel_that_hides_nothing_is_not(
    mode: str, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a.{suffix}"
    picture = Image.new(mode, (8, 6), {"RGBA": (9, 9, 9, 255), "LA": (9, 255)}.get(mode, 9))
    picture.save(file)
    assert read_image(file, channels=3).shape == (3, 6, 8)
    if mode in ("RGBA", "LA"):
        picture.putpixel((2, 3), (9, 9, 9, 200)[-len(mode) :])
        picture.save(file)
    else:
        picture.save(file, transparency=9)
    with pytest.raises(ValueError, match=r"a\..* has transparent pixels.*save it without transparency"):
        read_image(file, channels=3)


def test_images_whose_white_nobody_knows_or_that_are_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (np.float32, np.int32):
        Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"a.tif holds numbers of 32 bits.*save it with 8 or 16 bits"):
            read_image(tmp_path / "a.tif", channels=1)
    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"large.png is not a readable image: Image size \(81 pixels\)"):
        read_image(tmp_path / "large.png", channels=1)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the test's output."""


def test_downloads_are_verified_against_their_hash(tmp_path: Path) -> None:
    source = tmp_path / "server"
    write_idx(source / "t10k-labels-idx1-ubyte.gz", np.array([1, 2]))
    digest = hashlib.sha256((source / "t10k-labels-idx1-ubyte.gz").read_bytes()).hexdigest()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(source)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        good = {"t10k-labels-idx1-ubyte.gz": f"sha256:{digest}"}
        download_mnist(tmp_path / "data", base_url=url, files=good)
        assert load_labels("mnist", "test", root=tmp_path / "data").tolist() == [1, 2]
        bad = {"t10k-labels-idx1-ubyte.gz": "sha256:" + "0" * 64}
        with pytest.raises(ValueError, match="hash"):
            download_mnist(tmp_path / "other", base_url=url, files=bad)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif("JIIO_DATA_DIR" not in os.environ, reason="JIIO_DATA_DIR is not set: no real MNIST to read")
def test_real_mnist_has_its_official_counts() -> None:
    assert load_images("mnist", "train").shape == (60000, 1, 28, 28)
    assert load_labels("mnist", "test").bincount().tolist()[:3] == [980, 1135, 1032]
