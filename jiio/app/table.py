"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

console = Console()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "") -> None:
    """Print a table; the first column is text, the others numbers."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "draw"), counted(3, "draw")
    ('1 draw', '3 draws')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def with_interval(value: dict[str, float], digits: int = 2) -> str:
    """mean ± half width of the interval."""
    half = (value["high"] - value["low"]) / 2
    return f"{value['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if half > 0 else "")
