"""The figure of the scaling study."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from jiio.app.figure import save

COLOURS = {
    "joint, model's step": "tab:blue",
    "joint, model's matrix": "tab:green",
    "joint, automatic": "tab:cyan",
    "nested warm L-BFGS": "tab:orange",
    "nested cold Adam": "tab:red",
}


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Work, milliseconds and megabytes against every axis; where the target was not reached, there is no point."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, grid = plt.subplots(3, len(axes), figsize=(3.0 * len(axes) + 1, 9), squeeze=False)
    for column, axis in enumerate(axes):
        for line, (key, label, factor) in enumerate(
            (("work", "work a sample (f = 1)", 1.0), ("seconds", "ms a batch", 1e3), ("peak_bytes", "peak MB", 1e-6))
        ):
            panel = grid[line][column]
            for name, colour in COLOURS.items():
                points = medians(rows, axis, name, key)
                panel.plot(
                    [p[0] for p in points], [factor * p[1] for p in points], "o-", color=colour, label=name, ms=3
                )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(alpha=0.3, which="both", linewidth=0.5)
            panel.set_xlabel(axis)
            if column == 0:
                panel.set_ylabel(label)
            if axis == "contraction":
                panel.set_xscale("logit")
            values = sorted({row["value"] for row in rows if row["axis"] == axis})
            panel.set_xticks(values, [f"{value:g}" for value in values])
            panel.xaxis.set_minor_locator(NullLocator())
    handles, names = grid[0][0].get_legend_handles_labels()
    grid[0][-1].legend(handles, names, fontsize=7, loc="center", bbox_to_anchor=(0.5, 0.66))
    return save(figure, path)


def medians(rows: list[dict[str, Any]], axis: str, method: str, key: str) -> list[tuple[float, float]]:
    """(value, median over seeds) where every seed reached the target."""
    points = []
    for value in dict.fromkeys(row["value"] for row in rows if row["axis"] == axis):
        here = [row for row in rows if (row["axis"], row["value"], row["method"]) == (axis, value, method)]
        if here and all(row["reached"] for row in here):
            points.append((value, statistics.median(row[key] for row in here)))
    return points
