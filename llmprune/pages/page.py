"""The page: one HTML file that needs nothing else, of several models or of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.pages import plots
from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import Comparison
from llmprune.pages.grids import Grid, block_heat, candidate_grid, figure_grid, site_heats

HERE = Path(__file__).parent
COLUMNS = 7
"""Figures in one table; with more, the table goes on below."""


def render(comparison: Comparison, title: str) -> str:
    """The page as HTML; everything that was read is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    pictures, missing = plots.trade_offs(comparison)
    pruned = [one for one in comparison.candidates if one.manifest]
    return environment.get_template("page.html").render(
        title=title,
        candidates=candidate_grid(comparison),
        quality=figure_grids(comparison, "perplexity", "task", "generation"),
        speed=figure_grids(comparison, "speed"),
        pictures=pictures,
        missing=missing,
        blocks=block_heat(pruned) if len(pruned) > 1 else None,
        sites=[(one, site_heats(one)) for one in pruned if one.layers],
        curves=[picture for one in pruned if (picture := plots.curves(one))],
        texts=texts(comparison),
        pruned=pruned,
        widths=widths,
        calibration=calibration,
        columns=comparison.columns,
        settings=settings,
        surroundings=surroundings(comparison.candidates),
    )


def figure_grids(comparison: Comparison, *kinds: str, most: int = COLUMNS) -> list[Grid]:
    """Tables of figures, of no more than `most` each."""
    columns = comparison.of_kind(*kinds)
    return [figure_grid(comparison, columns[first : first + most]) for first in range(0, len(columns), most)]


def widths(manifest: dict[str, Any]) -> list[str]:
    """What every block keeps of its units, before and after; empty where weights are set to zero."""
    return [
        f"{kind['before']} to {kind['after']} {kind['units']}" for kind in (manifest["widths"] or {}).get("kinds", [])
    ]


def calibration(manifest: dict[str, Any]) -> str:
    """On what the run was calibrated, in words."""
    facts = manifest["calibration"]
    if not facts:
        return "none: the method looks at no data"
    return f"{facts['dataset']}, {facts['windows_used']} windows of {facts['seqlen']} tokens, sha256 {facts['sha256']}"


def settings(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """A protocol, row by row."""
    return [(key.replace("_", " "), value if isinstance(value, str) else json.dumps(value, default=str))
            for key, value in facts.items()]  # fmt: skip


def texts(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """What each model writes after the same prompt, the dense one first; models that were not asked are left out."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in comparison.candidates:
        for part in one.parts:
            if part.kind != "generation":
                continue
            protocol = {k: v for k, v in part.protocol.items() if not k.startswith("against")}
            key = json.dumps([part.name, protocol], sort_keys=True, default=str)
            for row in part.samples:
                told = found.setdefault((key, str(row.get("prompt", ""))), {})
                if row.get("dense_text") is not None:
                    told.setdefault("dense", str(row["dense_text"]))
                told["dense" if one.dense else one.name] = str(row.get("text", ""))
    return [(prompt, sorted(told.items(), key=lambda pair: pair[0] != "dense")) for (_, prompt), told in found.items()]


def surroundings(candidates: Sequence[Candidate]) -> list[str]:
    """Versions and machines of all measurements, each once."""
    parts = [part for one in candidates for part in one.parts]
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())
             for part in parts for facts in (part.versions, part.hardware) if facts]  # fmt: skip
    return list(dict.fromkeys(lines))
