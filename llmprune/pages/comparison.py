"""Which figures may stand side by side: those of one name under one protocol share a column, and no others.

What was measured of a dense model along with a pruned one (`dense_perplexity`, ...) stands in the dense model's row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune_eval.result import KINDS, Part

from llmprune.errors import InputError
from llmprune.pages.candidates import HELD_OUT, Candidate, same_model, with_dense
from llmprune.pages.figures import FIGURES, Figure, words

DENSE = "dense_"
"""What begins the name of a figure of the dense model."""
SPREAD = {"tokens_per_second": ("p10", "p90"), "speedup": ("speedup_p10", "speedup_p90")}
"""Of the figures: no figures of their own."""
MEAN = "mean of tasks"


@dataclass(frozen=True)
class Cell:
    """One figure; value None where it is not finite. `spread` is what a tenth of the timings lies below and above."""

    value: float | None
    stderr: float | None = None
    spread: tuple[float, float] | None = None


@dataclass
class Column:
    """One figure under one protocol.

    Attributes:
        kind, name: as in the parts.
        figure: its name among their values.
        protocol: what all of them have in common.
        cells: by the candidate's place.
        heading: words that tell it from the others.
    """

    kind: str
    name: str
    figure: str
    protocol: dict[str, Any]
    cells: dict[int, Cell] = field(default_factory=dict)
    heading: str = ""

    @property
    def style(self) -> Figure:
        """How it is written and which way is better."""
        return FIGURES.get(self.figure, Figure(self.figure.replace("_", " ")))

    def best(self, among: Sequence[int]) -> int | None:
        """The place of the best of several figures; None where there is no telling."""
        known = [(cell.value, i) for i, cell in self.cells.items() if i in among and cell.value is not None]
        if self.style.better == 0 or len(known) < 2:
            return None
        value, place = max(known, key=lambda pair: pair[0] * self.style.better)
        return place if [v for v, _ in known].count(value) == 1 and not self._overlaps(place, among) else None

    def _overlaps(self, place: int, among: Sequence[int]) -> bool:
        """True if the spread of a figure reaches into that of another."""
        own = self.cells[place].spread
        others = [cell.spread for i, cell in self.cells.items() if i in among and i != place]
        return own is not None and any(other and other[0] <= own[1] and own[0] <= other[1] for other in others)


@dataclass
class Comparison:
    """Candidates, the dense ones first, and every figure that was measured of them."""

    candidates: list[Candidate]
    columns: list[Column]

    @property
    def pruned(self) -> list[int]:
        """Places of those that are not dense."""
        return [i for i, one in enumerate(self.candidates) if not one.dense]

    def of_kind(self, *kinds: str) -> list[Column]:
        """Columns in order."""
        return [column for column in self.columns if column.kind in kinds]


def compare(candidates: Sequence[Candidate]) -> Comparison:
    """Put figures of one protocol side by side.

    Raises:
        InputError: several candidates, and no figure of two of them under one protocol.
    """
    rows = with_dense(candidates)
    columns: dict[str, Column] = {}
    for i, one in enumerate(rows):
        for part in one.parts:
            _add(columns, part, i, rows)
    ordered = list(columns.values())
    if len(candidates) > 1 and not any(len(column.cells) > 1 for column in _between(ordered, rows, candidates)):
        raise InputError(_nothing_common(candidates))
    mean = _mean_accuracy(ordered)
    ordered = sorted([*ordered, *([mean] if mean else [])], key=_order)
    _name(ordered, rows)
    return Comparison(rows, ordered)


def _order(column: Column) -> tuple[int, bool]:
    """By kind; what was left over from calibration behind what was chosen for evaluation."""
    return (*KINDS, column.kind).index(column.kind), column.name == HELD_OUT


def _add(columns: dict[str, Column], part: Part, place: int, rows: Sequence[Candidate]) -> None:
    """File every figure of a part."""
    for name, value in part.values.items():
        if any(name in pair for pair in SPREAD.values()) or (part.kind == "generation" and name not in FIGURES):
            continue
        row, figure = place, name
        if name.startswith(DENSE):
            figure = name.removeprefix(DENSE)
            row = _dense_place(part, rows[place], rows)
            if row < 0:
                continue
        protocol = _protocol(part, figure)
        what = part.name.rsplit("/", 1)[-1] if protocol.get("revision") else part.name  # the text is known by its hash
        asked = {k: v for k, v in protocol.items() if k != "dataset" or not protocol.get("revision")}
        key = json.dumps([part.kind, what, figure, asked], sort_keys=True, default=str)
        column = columns.setdefault(key, Column(part.kind, part.name, figure, protocol))
        own = row == place
        low, high = (part.values.get(limit) for limit in SPREAD.get(name, ("", "")))
        limits = None if low is None or high is None else (low, high)
        if own or row not in column.cells:
            column.cells[row] = Cell(value, part.stderr.get(name), limits)
        if figure == "speedup":
            column.cells.setdefault(_dense_place(part, rows[place], rows), Cell(1.0))
            column.cells.pop(-1, None)


def _protocol(part: Part, figure: str) -> dict[str, Any]:
    """What two figures must share: the reference only where it is part of the figure, the machine for speed."""
    relative = FIGURES.get(figure, Figure("")).relative
    found = {k: v for k, v in part.protocol.items() if relative or not k.startswith("against")}
    machine = {k: v for k, v in part.hardware.items() if k != "memory"}  # its last bytes differ from start to start
    return {**found, **machine} if part.kind == "speed" else found


def _dense_place(part: Part, own: Candidate, rows: Sequence[Candidate]) -> int:
    """The row of the model that a part was measured against, or -1."""
    against = part.protocol.get("against") or own.base
    named = list(against.values()) if isinstance(against, dict) else [against]
    names = [name for name in named if isinstance(name, str)]
    return next((i for i, row in enumerate(rows) if row.dense and any(same_model(row.model, n) for n in names)), -1)


def _between(columns: Sequence[Column], rows: Sequence[Candidate], given: Sequence[Candidate]) -> Iterator[Column]:
    """The columns, with the cells of those models alone that the user has given."""
    names = {one.model for one in given}
    for column in columns:
        cells = {i: cell for i, cell in column.cells.items() if rows[i].model in names}
        yield Column(column.kind, column.name, column.figure, column.protocol, cells)


def _nothing_common(candidates: Sequence[Candidate]) -> str:
    what = "; ".join(
        f"{one.name} has {', '.join(sorted({p.name for p in one.parts})) or 'no measurements'}" for one in candidates
    )
    return (
        f"nothing was measured of two of them in the same way ({what}): run `llmprune eval` on each, with one protocol"
    )


def _mean_accuracy(columns: Sequence[Column]) -> Column | None:
    """acc averaged over the tasks that all have who have any; None where that is no more than one task."""
    accuracies = [column for column in columns if column.kind == "task" and column.figure == "acc"]
    tested = {i for column in accuracies for i in column.cells}
    shared = [c for c in accuracies if set(c.cells) == tested and all(v.value is not None for v in c.cells.values())]
    settings = [{key: column.protocol.get(key) for key in ("num_fewshot", "limit")} for column in shared]
    tasks = [column.name for column in shared]
    if len(shared) < 2 or len(set(tasks)) < len(tasks) or any(each != settings[0] for each in settings):
        return None  # a task measured in two ways, or not all in one: there is no telling which mean is meant
    mean = Column("task", MEAN, "acc", {"mean of": "acc", "tasks": tasks, **settings[0]})
    mean.cells = {i: Cell(math.fsum(c.cells[i].value or 0.0 for c in shared) / len(shared)) for i in sorted(tested)}
    return mean


def _name(columns: Sequence[Column], rows: Sequence[Candidate]) -> None:
    """Give every column a heading: the settings in which it differs from those of the same name are part of it."""
    for column in columns:
        twins = [c for c in columns if (c.kind, c.name, c.figure) == (column.kind, column.name, column.figure)]
        keys = [key for key in dict.fromkeys(k for c in twins for k in c.protocol) if len(
            {json.dumps(c.protocol.get(key), sort_keys=True, default=str) for c in twins}) > 1]  # fmt: skip
        told = [words(key, column.protocol.get(key)) for key in keys]
        column.heading = ", ".join([_subject(column, rows), *(text for text in told if len(text) < 30)])


def _subject(column: Column, rows: Sequence[Candidate]) -> str:
    """What was measured; beside another model than the dense one, that model stands in its place."""
    short = column.name.rsplit("/", 1)[-1] if column.kind == "perplexity" else column.name
    text = f"{column.style.label}, {short}" if column.kind != "generation" else column.style.label
    against = column.protocol.get("against")
    name = against.get("name") if isinstance(against, dict) else against
    if isinstance(name, str) and not any(row.dense and same_model(row.model, name) for row in rows):
        return text.replace("dense", Path(name).name)
    return text
