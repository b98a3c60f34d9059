"""The learning run as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def draw_curves(rows: Sequence[Mapping[str, Any]], units: Mapping[str, int], path: Path) -> None:
    """Loss, budget, and widths over the steps, one below the other, as a PNG.

    Args:
        rows: the report's curves.
        units: of each kind before, by output projection.
    """
    try:
        import matplotlib
    except ImportError:
        log.warning("no picture of the learning run: install llmprune[report]")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, (loss, budget, widths) = pyplot.subplots(3, 1, figsize=(7, 7), sharex=True)
    loss.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    loss.set(ylabel="loss", yscale="log" if min(row["loss"] for row in rows) > 0 else "linear")
    budget.plot(steps, [row["kept_share"] for row in rows], color="tab:orange", label="share of the units kept")
    budget.axhline(rows[0]["budget"], color="black", linestyle="--", linewidth=1, label="budget")
    seen = [(row["step"], row["overlap"]) for row in rows if row["overlap"] is not None]
    if seen:
        budget.plot(*zip(*seen, strict=True), color="tab:green", label="overlap with the set before")
    budget.set(ylim=(0, 1.02))
    budget.legend(fontsize=8)
    for kind, whole in units.items():
        widths.plot(steps, [row["widths"][kind] / whole for row in rows], label=f"{kind}, of {whole}")
    widths.set(ylabel="width / dense width", ylim=(0, 1.02), xlabel="step")
    widths.legend(fontsize=8)
    for axis in (loss, budget, widths):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
