"""What goes to the terminal: only here and in the entry point is anything printed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence

import typer
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 110


def is_first() -> bool:
    """True on the one process that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print on rank 0; nothing for an empty answer."""
    if text and is_first():
        typer.echo(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain-text table: the first column to the left, the others to the right."""
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(drawn, markup=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def number(value: float | None, digits: int = 4) -> str:
    """A figure, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}g}"
