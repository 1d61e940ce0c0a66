"""How far a command is: a bar on a terminal; in a file or a pipe, where nobody would see it move, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jiio.app.table import console

Count = Callable[[int], object]  # takes how many more are done
Stage = Callable[[str], object]  # takes what is done next
PARTS = 10  # of the way, each of which has a line where there is no bar


def steps_bar(figures: Generator[dict[str, float]], *, total: int, label: str, done: int = 0) -> None:
    """Run through the steps of a training under a bar with loss, PSNR or accuracy, lag of z and mu, and time left."""
    with _steps(label, total, done) as told, closing(figures) as steps:
        for now in steps:
            lag = max(now.get("residual_z", 0.0), now.get("residual_mu", 0.0))
            quality = f"{now['psnr']:.1f} dB" if "psnr" in now else f"{100 * now['accuracy']:.0f} %"
            told(f"loss {now['loss']:.3f}  {quality}  lag {lag:.0e}")


@contextmanager
def _steps(label: str, total: int, done: int) -> Iterator[Callable[[str], object]]:
    """The yielded function counts a step and shows the state after it."""
    if not console.is_interactive:
        lines = _Lines(label, total, done)
        yield lambda state: lines.add(1, state)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[clock]}"),
    )
    # a step may take longer than the half minute from which rich takes the speed otherwise
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task(label, total=total, completed=done, state="", clock="left")
        yield lambda state: progress.update(task, advance=1, state=state)
        progress.update(task, clock="in all")


@contextmanager
def images_bar(label: str, *, total: int) -> Iterator[Count]:
    """A bar over `total` images; the yielded function takes how many more are done."""
    if not console.is_interactive:
        yield _Lines(label, total).add
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.update(task, advance=count)


@contextmanager
def stages(first: str) -> Iterator[Stage]:
    """What is being done, `first` to begin with; the yielded function takes what is next."""
    if not console.is_interactive:
        _begun(first)
        yield _begun
        return
    with console.status(first) as status:
        yield status.update


def _begun(stage: str) -> None:
    console.print(f"{stage} ...")


class _Lines:
    """A line at each of `PARTS` parts of the way, with the time that it took and what is left at this speed."""

    def __init__(self, label: str, total: int, done: int = 0):
        self.label, self.total, self.done, self.first = label, total, done, done
        self.began = time.perf_counter()

    def add(self, count: int, state: str = "") -> None:
        """So many more are done; a line where they complete a part."""
        before, self.done = self.done, self.done + count
        if self.done * PARTS // self.total > before * PARTS // self.total:
            seconds = time.perf_counter() - self.began
            clock = f"{seconds:.0f} s"
            if self.done < self.total:
                left = seconds * (self.total - self.done) / (self.done - self.first)
                clock += f", {timedelta(seconds=round(left))} left"
            line = "  ".join(filter(None, (f"{self.label}: {self.done} of {self.total}", state, clock)))
            console.print(line, soft_wrap=True)
