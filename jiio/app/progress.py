"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jiio.app.table import console


def steps_bar(figures: Iterable[dict[str, float]], *, total: int, label: str, done: int = 0) -> None:
    """Run through the steps of a training under a bar with loss, PSNR or accuracy, lag of z and mu, and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[clock]}"),
    )
    # a step may take longer than the half minute from which rich takes the speed otherwise
    with Progress(*columns, console=console, speed_estimate_period=600) as progress, closing(iter(figures)) as steps:  # pyright: ignore
        task = progress.add_task(label, total=total, completed=done, state="", clock="left")
        for now in steps:
            lag = max(now.get("residual_z", 0.0), now.get("residual_mu", 0.0))
            quality = f"{now['psnr']:.1f} dB" if "psnr" in now else f"{100 * now['accuracy']:.0f} %"
            state = f"loss {now['loss']:.3f}  {quality}  lag {lag:.0e}"
            progress.update(task, advance=1, state=state)
        progress.update(task, clock="in all")


@contextmanager
def images_bar(label: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` images; the yielded function takes how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.update(task, advance=count)
