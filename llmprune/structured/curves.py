"""The learning run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(rows: Sequence[Mapping[str, Any]], units: Mapping[str, int]) -> Figure:
    """Loss, budget, and widths over the steps, one below the other.

    Args:
        rows: the report's curves.
        units: of each kind before, by output projection.
    """
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(4.8, 6.5), layout="constrained")
    loss, budget, widths = figure.subplots(3, 1, sharex=True)
    loss.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    loss.set(ylabel="loss", yscale="log" if min(row["loss"] for row in rows) > 0 else "linear")
    budget.plot(steps, [row["kept_share"] for row in rows], color="tab:orange", label="share of the units kept")
    budget.axhline(rows[0]["budget"], color="tab:gray", linestyle="--", linewidth=1, label="budget")
    seen = [(row["step"], row["overlap"]) for row in rows if row["overlap"] is not None]
    if seen:
        budget.plot(*zip(*seen, strict=True), color="tab:green", label="overlap with the set before")
    budget.set(ylim=(0, 1.02))
    budget.legend(fontsize="small")
    for kind, whole in units.items():
        widths.plot(steps, [row["widths"][kind] / whole for row in rows], label=f"{kind}, of {whole}")
    widths.set(ylabel="width / dense width", ylim=(0, 1.02), xlabel="step")
    widths.legend(fontsize="small")
    for axis in (loss, budget, widths):
        axis.grid(alpha=0.3)
    return figure
