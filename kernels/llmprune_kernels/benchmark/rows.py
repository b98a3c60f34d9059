"""The table: rows in a CSV file, one per GPU, layer, dtype, rows and kernel, and the same rows for the terminal."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEY = ("gpu", "layer", "dtype", "rows", "kernel")
COLUMNS = (
    *KEY, "outputs", "inputs", "megabytes", "microseconds", "p10", "p90", "gigabytes_per_second", "share_of_copy",
    "speedup", "ceiling", "share_of_roof", "relative_error", "dense_error", "tokens_per_second", "peak_megabytes",
    "memory_ratio", "copies", "copy_gigabytes_per_second", "launch_microseconds", "driver", "sm_clock_mhz",
    "memory_clock_mhz", "torch", "triton", "cusparselt", "commit", "date", "command",
)  # fmt: skip


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a file; none if there is no file.

    Raises:
        ValueError: it is not such a table.
    """
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file} has other columns than this table: move it away, or pass another --out")
        return list(reader)


def merge(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a file: each in the place of the one with its KEY, or at the end. Whole or not at all.

    Raises:
        ValueError: as `read`, or a row has a column that the table has not.
    """
    table = {tuple(row[name] for name in KEY): row for row in read(file)}
    for row in rows:
        text = {name: _text(row.get(name)) for name in COLUMNS}
        unknown = sorted(row.keys() - set(COLUMNS))
        if unknown:
            raise ValueError(f"the table has no column {unknown[0]!r}")
        table[tuple(text[name] for name in KEY)] = text
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table.values())
        part.chmod(0o644)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def show(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Rows of one layer as a table for the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rows", "kernel", "us", "p10-p90", "GB/s", "of copy", "speed-up", "ceiling", "of roof", "error"):
        drawn.add_column(column, justify="left" if column == "kernel" else "right")
    for row in sorted(rows, key=lambda row: int(row["rows"])):
        drawn.add_row(
            str(row["rows"]),
            str(row["kernel"]),
            f"{row['microseconds']:.2f}",
            f"{row['p10']:.2f}-{row['p90']:.2f}",
            _figure(row, "gigabytes_per_second", ".0f"),
            _figure(row, "share_of_copy", ".0%"),
            _figure(row, "speedup", ".2f"),
            _figure(row, "ceiling", ".2f"),
            _figure(row, "share_of_roof", ".0%"),
            _figure(row, "relative_error", ".1e"),
        )
    console = Console(file=io.StringIO(), width=130, color_system=None)
    console.print(drawn, markup=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _figure(row: dict[str, Any], name: str, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if row.get(name) is None else format(row[name], form)


def _text(value: object) -> str:
    """As it stands in the file; figures with six digits."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
