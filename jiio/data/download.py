"""Downloads of MNIST, verified and only when asked for; nothing in the library downloads by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pooch

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


def download_mnist(
    root: Path, *, base_url: str = MNIST_URL, files: Mapping[str, str] = MNIST_FILES, progress: bool = False
) -> list[Path]:
    """Fetch the four files into ROOT/MNIST/raw, skipping those already there with the right hash.

    Raises `ValueError` when a file does not have its hash, `OSError` when the server can't be reached.
    """
    fetcher = pooch.create(path=root / "MNIST" / "raw", base_url=base_url, registry=dict(files))
    downloader: Any = pooch.HTTPDownloader(progressbar=progress)
    return [Path(fetcher.fetch(name, downloader=downloader)) for name in files]
