"""What `jiio bench` shows and writes: a table for each problem, one JSON object, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jiio.app.bench import SHARES
from jiio.app.figure import save
from jiio.app.table import console, show

PLAIN = FuncFormatter(lambda value, place: f"{value:.2g}" if value < 10 else f"{value:.0f}")
RATIOS = (("cold", "the best tuned cold nested method"), ("warm", "the best warm nested method"))


def as_report(results: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    """The object that --json writes: rows, summary and step_cost of all problems, and where they were measured."""
    names = {id(result): _name(result, results) for result in results}
    return {
        "machine": machine,
        "rows": [row for result in results for row in result["rows"]],
        "summary": {names[id(result)]: result["summary"] for result in results},
        "step_cost": {names[id(result)]: result["step_cost"] for result in results},
        "reference_cost": {names[id(result)]: result["reference_cost"] for result in results},
        "settings": {names[id(result)]: result["settings"] for result in results},
        "prices": {names[id(result)]: result["prices"] for result in results},
    }


def _name(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The problem, with the model where several models have it."""
    same = [other for other in results if other["problem"] == result["problem"]]
    return result["problem"] if len(same) == 1 else f"{result['problem']}, {result['model']}"


def show_result(result: dict[str, Any]) -> None:
    """A line a method; work and seconds to each target."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = {row["share"]: row for row in result["rows"] if row["method"] == name}
        cells = [
            f"{rows[share]['work']:.0f} / {1e3 * rows[share]['seconds']:.0f}"
            if rows[share]["reached"]
            else ("not reached" if rows[share]["resolved"] else "z not solved")
            for share in SHARES
        ]
        lines.append([name, *cells])
    show(
        f"{result['problem']}, {result['model']}: best known cost {result['reference_cost']:.4g}",
        ("method", *(f"to {share} x" for share in SHARES)),
        lines,
        note="work of a sample in evaluations of f / milliseconds for the whole batch",
    )
    for kind, words in RATIOS:
        work, seconds = (result["summary"][f"{kind}_{unit}_ratio"] for unit in ("work", "seconds"))
        if work is not None:
            console.print(f"  against {words}: {work:.1f} times less work, {seconds:.1f} times less time")
    costs = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in result["step_cost"].items())
    console.print(f"  a joint step over bare f, VJP and cost gradient: {costs}\n")


def figure(results: list[dict[str, Any]], path: Path) -> Path:
    """Cost against work (left) and seconds (right, bars from the fastest to the slowest repeat), a line a method."""
    canvas, axes = plt.subplots(len(results), 2, figsize=(10, 3.6 * len(results)), squeeze=False)
    names = list(dict.fromkeys(row["method"] for result in results for row in result["rows"]))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    for (left, right), result in zip(axes, results, strict=True):
        for name in names:
            all_rows = [row for row in result["rows"] if row["method"] == name]
            rows = [row for row in all_rows if row["reached"]]
            if not rows:
                if all_rows:
                    right.plot([], color=colours[name], label=f"{name}: no target reached")
                continue
            shares = [float(row["share"]) for row in rows]
            style: dict[str, Any] = {"color": colours[name], "label": name, "marker": "o", "markersize": 3}
            style["linewidth"] = 2.2 if name == "joint" else 1.0
            left.plot([row["work"] for row in rows], shares, **style)
            seconds = [row["seconds"] for row in rows]
            bars = [
                [row["seconds"] - row["fastest"] for row in rows],
                [row["slowest"] - row["seconds"] for row in rows],
            ]
            right.errorbar(seconds, shares, xerr=bars, capsize=2, **style)
        for axis, label in ((left, "work of a sample, evaluations of f"), (right, "seconds for the batch")):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(PLAIN)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(axis="x", which="both", labelsize=7)
            axis.set_xlabel(label)
            axis.set_ylabel("cost / best known")
            axis.set_yticks([float(share) for share in SHARES], list(SHARES))
            axis.set_title(f"{result['problem']}, {result['model']}", fontsize=9)
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(canvas, path)
