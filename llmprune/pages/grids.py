"""A comparison as tables of text, which the terminal, the page and the model card draw each in their way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import Column, Comparison
from llmprune.pages.figures import number, size, write


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: headings; the first names the rows.
        rows: cells of text.
        notes: of each column, the number of its protocol, or "".
        best: (row, column) of what is to stand out.
        dense: rows of dense models.
    """

    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    best: frozenset[tuple[int, int]] = frozenset()
    dense: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Heat:
    """Shares by row and column, to be drawn in colour; None where there is none."""

    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    largest: float


def candidate_grid(comparison: Comparison) -> Grid:
    """What each model is."""
    columns = ["model", "method", "pattern", "sparsity", "of the decoder", "parameters", "not zero", "size on disk"]
    rows = [_facts(one) for one in comparison.candidates]
    return _without_empty(Grid(columns, rows, [""] * len(columns), dense=_dense(comparison)))


def _facts(one: Candidate) -> list[str]:
    counts = [f"{n:,}" if n is not None else "-" for n in (one.parameters, one.nonzero)]
    last = [*counts, size(one.bytes)]
    if one.manifest is None:
        return [shown(one), "dense" if one.dense else "not said", "-", "-", "-", *last]
    manifest = one.manifest
    return [shown(one), manifest["config"]["method"], manifest["pattern"], f"{manifest['sparsity']:.1%}",
            f"{manifest['decoder_share']:.1%}", *last]  # fmt: skip


def figure_grid(comparison: Comparison, columns: Sequence[Column]) -> Grid:
    """Figures by model and protocol, without the models of which none was measured."""
    places = [i for i in range(len(comparison.candidates)) if any(i in column.cells for column in columns)]
    best = {(column.best(comparison.pruned), c + 1) for c, column in enumerate(columns)}
    return Grid(
        ["model", *(column.heading for column in columns)],
        [[shown(comparison.candidates[i]), *(cell_text(column, i) for column in columns)] for i in places],
        ["", *(str(comparison.columns.index(column) + 1) for column in columns)],
        frozenset((places.index(row), c) for row, c in best if row is not None),
        frozenset(places.index(i) for i in _dense(comparison) if i in places),
    )


def cell_text(column: Column, place: int) -> str:
    """A figure with its uncertainty, or a dash."""
    cell = column.cells.get(place)
    if cell is None:
        return "-"
    text = write(cell.value, column.style.form)
    if cell.stderr is not None:
        return f"{text} ± {number(cell.stderr, 2)}"
    return f"{text} ({number(cell.spread[0], 3)} to {number(cell.spread[1], 3)})" if cell.spread else text


def shown(one: Candidate) -> str:
    """The name, with a word for the model that is not pruned."""
    return f"{one.name} (dense)" if one.dense and one.name != "dense" else one.name


def _dense(comparison: Comparison) -> frozenset[int]:
    return frozenset(i for i, one in enumerate(comparison.candidates) if one.dense)


def _without_empty(grid: Grid) -> Grid:
    """Without the columns that hold nothing but dashes."""
    keep = [c for c in range(len(grid.columns)) if any(row[c] != "-" for row in grid.rows)]
    return Grid([grid.columns[c] for c in keep], [[row[c] for c in keep] for row in grid.rows],
                [""] * len(keep), dense=grid.dense)  # fmt: skip


def block_heat(candidates: Sequence[Candidate]) -> Heat | None:
    """Relative error of every block, a row for each model, beside those with as many blocks."""
    rows = [(one.name, [block["relative_error"] for block in one.layers]) for one in candidates if one.layers]
    rows = [(name, errors) for name, errors in rows if any(error is not None for error in errors)]
    if not rows:
        return None
    longest = max(len(errors) for _, errors in rows)
    return _heat([str(i) for i in range(longest)], [(n, e + [None] * (longest - len(e))) for n, e in rows])


def site_heats(one: Candidate) -> dict[str, Heat]:
    """Sparsity and relative error by layer and site, experts of one part taken together."""
    kinds = list(dict.fromkeys(kind for block in one.layers for kind in map(_kind, _named(block))))
    if not kinds:
        return {}
    cut = bool(one.manifest and one.manifest["widths"])
    shares = [(str(i), [_share(_of(block, kind)) for kind in kinds]) for i, block in enumerate(one.layers)]
    heats = {"columns cut" if cut else "sparsity": _heat(_short(kinds), shares, 1.0)}
    errors = [(str(i), [_error(_of(block, kind)) for kind in kinds]) for i, block in enumerate(one.layers)]
    if any(value is not None for _, row in errors for value in row):
        heats["relative error"] = _heat(_short(kinds), errors)
    return heats


def _heat(columns: list[str], rows: list[tuple[str, list[float | None]]], largest: float = 0.0) -> Heat:
    known = [value for _, row in rows for value in row if value is not None]
    return Heat(columns, rows, largest or max([*known, 1e-9]))


def _named(block: dict[str, Any]) -> list[str]:
    return [str(site["name"]).removeprefix(f"{block['name']}.") for site in block["sites"]]


def _kind(name: str) -> str:
    """The name with numbers starred: experts of one block share it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _of(block: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [site for site, name in zip(block["sites"], _named(block), strict=True) if _kind(name) == kind]


def _share(sites: Sequence[dict[str, Any]]) -> float | None:
    whole = sum(site["shape"][0] * site["shape"][1] for site in sites)
    return sum(site["pruned"] for site in sites) / whole if whole else None


def _error(sites: Sequence[dict[str, Any]]) -> float | None:
    known = [site["relative_error"] for site in sites if site["relative_error"] is not None]
    return sum(known) / len(known) if known else None


def _short(kinds: Sequence[str]) -> list[str]:
    """The last part of each name where that tells them apart."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [short if last.count(short) == 1 else kind for kind, short in zip(kinds, last, strict=True)]
