from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from jiio.app.figure import curves, image_grid


def test_a_grid_has_the_size_of_its_rows_and_columns(tmp_path: Path) -> None:
    rows = [("grey", torch.rand(3, 1, 8, 8), ["a", "b", "c"]), ("colour", torch.rand(2, 3, 6, 4), None)]
    path = image_grid(rows, tmp_path / "new" / "grid.png", title="title")
    with Image.open(path) as picture:
        assert picture.size == (int(130 * (1.05 * 3 + 1.2)), int(130 * (1.25 * 2 + 0.4)))


def test_curves_are_drawn(tmp_path: Path) -> None:
    path = curves(
        {"x": ([1, 2, 3], [1.0, 0.1, 0.01])}, tmp_path / "curves.png", labels=("step", "residual"), log_x=True
    )
    with Image.open(path) as picture:
        assert picture.size == (832, 520)
