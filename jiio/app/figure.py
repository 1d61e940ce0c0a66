"""Pictures: grids of images with captions, traces, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor


def image_grid(rows: Sequence[tuple[str, Tensor, Sequence[str] | None]], path: Path, *, title: str = "") -> Path:
    """One row of images for each (label, images (n, c, h, w) in [0, 1], captions below them or None)."""
    columns = max(len(images) for _, images, _ in rows)
    height = 1.25 * len(rows) + 0.4
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.05 * columns + 1.2, height), squeeze=False)
    for line, (label, images, captions) in zip(axes, rows, strict=True):
        for i, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if i >= len(images):
                axis.axis("off")
                continue
            picture = images[i].clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if captions:
                axis.set_xlabel(captions[i], fontsize=7, labelpad=2)
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", labelpad=8)
    if title:
        # in inches: a share of a tall figure's height lies within its rows
        figure.subplots_adjust(top=1 - 0.45 / height)
        figure.suptitle(title, fontsize=10, y=1 - 0.1 / height)
    return save(figure, path)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    *,
    labels: tuple[str, str],
    title: str = "",
    log_x: bool = False,
) -> Path:
    """Lines (x, y) by name, logarithmic in y."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    for name, (x, y) in series.items():
        axis.plot(x, y, label=name, linewidth=1.4)
    axis.set_yscale("log")
    if log_x:
        axis.set_xscale("log")
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axis.legend(fontsize=8)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
