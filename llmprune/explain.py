"""Every output folder explains itself: a model card and a page, written with it and kept up with measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune_eval.result import RESULT, Result, write_text

from llmprune.manifest import read_manifest
from llmprune.pages.candidates import from_folder
from llmprune.pages.card import CARD, card_text, renewed, results_section
from llmprune.pages.comparison import compare
from llmprune.pages.page import render

REPORT = "report.html"
ADVICE = "make the folder writable"


def explain(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Write the card and the page into a folder that holds the weights.

    Args:
        name: that the folder will have.
    """
    one = from_folder(folder, name, manifest, None)
    comparison = compare([one])
    (folder / CARD).write_text(card_text(folder, one, comparison), encoding="utf-8")
    (folder / REPORT).write_text(render(comparison, f"Pruning report: {name}"), encoding="utf-8")


def refresh(folder: Path) -> None:
    """Bring the card's results and the page up to what was measured since; nothing for a folder without manifest.

    In the card only what stands between its two marks changes. A card that is gone, or has lost its marks, is left so.

    Raises:
        InputError: the manifest or the results are damaged, or the folder cannot be written.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    result = Result.read(folder / RESULT) if (folder / RESULT).is_file() else None
    name = folder.resolve().name
    comparison = compare([from_folder(folder, name, manifest, result)])
    card = folder / CARD
    if card.is_file():
        old = card.read_bytes().decode("utf-8", "surrogateescape")  # line ends and all else as the user has them
        write_text(card, renewed(old, results_section(comparison)), ADVICE)
    write_text(folder / REPORT, render(comparison, f"Pruning report: {name}"), ADVICE)
