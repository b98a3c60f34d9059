"""`llmprune compare`: models side by side, in the terminal, as a page, or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune_eval.result import write_text
from llmprune_eval.terminal import table

from llmprune.errors import InputError
from llmprune.pages.candidates import read_candidates
from llmprune.pages.comparison import Comparison, compare
from llmprune.pages.grids import Grid, candidate_grid
from llmprune.pages.page import figure_grids, render

NARROW = 3
"""Figures beside each other in the terminal."""


def run_compare(paths: Sequence[Path], html: Path | None, as_json: bool) -> str:
    """Read, compare, write the page if one is wanted; returns text for the terminal."""
    if html is not None:
        check_page(html)
    comparison = compare(read_candidates(paths))
    if html is not None:
        write_page(html, comparison, "Pruned models compared")
    if as_json:
        return json.dumps(_as_dict(comparison), indent=1)
    return comparison_text(comparison) + (f"\n\npage        {html}" if html is not None else "")


def check_page(path: Path) -> None:
    """Find out before the work begins whether a page can be written.

    Raises:
        InputError: it cannot.
    """
    if path.suffix not in (".html", ".htm"):
        raise InputError(f"--html {path}: give a file whose name ends in .html")
    folder = path.absolute().parent
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"--html {path} cannot be written: give a file in a folder that exists and is writable")


def write_page(path: Path, comparison: Comparison, title: str) -> None:
    """The page as a file, at once or not at all."""
    write_text(path, render(comparison, title), "name another file with --html")


def comparison_text(comparison: Comparison) -> str:
    """The tables, and the protocols of their numbered columns."""
    texts = [_drawn("Models", candidate_grid(comparison))]
    for title, kinds in (("Quality", ("perplexity", "task", "generation")), ("Speed", ("speed",))):
        grids = figure_grids(comparison, *kinds, most=NARROW)
        texts += [_drawn(title, grid) for grid in grids] or [f"{title}: not measured"]
    lines = [f"  [{i}] {column.heading}: {_brief(column.protocol)}"
             for i, column in enumerate(comparison.columns, start=1)]  # fmt: skip
    return "\n\n".join([*texts, "\n".join(["Protocols", *lines])])


def _brief(protocol: Mapping[str, Any]) -> str:
    """A protocol in a line or two; hashes by their beginnings. All of it is in the JSON and on the page."""
    told = {k: v[:12] if isinstance(v, str) and k.endswith(("sha256", "revision")) else v for k, v in protocol.items()}
    return ", ".join(
        f"{key.replace('_', ' ')} {value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in told.items()
        if value is not None and not isinstance(value, dict)
    )


def _drawn(title: str, grid: Grid) -> str:
    heads = [name + (f" [{note}]" if note else "") for name, note in zip(grid.columns, grid.notes, strict=True)]
    rows = [[cell + "*" * ((i, c) in grid.best) for c, cell in enumerate(row)] for i, row in enumerate(grid.rows)]
    return table(title + (" (* the best of the pruned)" if grid.best else ""), heads, rows)


def _as_dict(comparison: Comparison) -> dict[str, object]:
    """Every figure in full precision."""
    names = [one.name for one in comparison.candidates]
    keys = ("name", "model", "base", "bytes", "parameters", "nonzero", "dense")
    return {
        "models": [{key: getattr(one, key) for key in keys} for one in comparison.candidates],
        "figures": [
            {"kind": c.kind, "name": c.name, "figure": c.figure, "protocol": c.protocol,
             "values": {names[i]: asdict(cell) for i, cell in c.cells.items()}}
            for c in comparison.columns
        ],
    }  # fmt: skip
