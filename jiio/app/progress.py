"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jiio.app.table import console


def steps_bar(figures: Iterable[dict[str, float]], *, total: int, label: str, done: int = 0) -> None:
    """Run through the steps of a training under a bar with loss, PSNR, share converged and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, closing(iter(figures)) as steps:  # pyright: ignore
        task = progress.add_task(label, total=total, completed=done, state="")
        for now in steps:
            state = f"loss {now['loss']:.3f}  {now['psnr']:.1f} dB  converged {100 * now['converged']:.0f} %"
            progress.update(task, advance=1, state=state)
