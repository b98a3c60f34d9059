"""Plots as pictures within a page: each drawn twice, for light and for dark, and legible at the width of a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import MEAN, Column, Comparison
from llmprune.structured.curves import draw_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = {"light": ("#1d2129", "#c9cdd4"), "dark": ("#e4e6ea", "#4a4f57")}
"""Of text and lines, and of the grid, by theme; the ground is the page's own."""
SPEEDS = ("speedup", "tokens_per_second")
POINTS = {"light": "#b4451f", "dark": "#ff9a6b"}


@dataclass(frozen=True)
class Picture:
    """A plot, by theme, as data URIs.

    Attributes:
        title: what it shows.
        text: the same for who cannot see it.
    """

    title: str
    text: str
    light: str
    dark: str


@dataclass(frozen=True)
class Point:
    """One model in a plot."""

    name: str
    x: float
    y: float
    dense: bool


def draw(title: str, text: str, figure: Callable[[str], Figure]) -> Picture:
    """Draw in both themes; `figure` gets the colour of points."""
    import matplotlib

    drawn = {}
    for theme, (ink, grid) in INK.items():
        colours: Any = {"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
                   "ytick.color": ink, "grid.color": grid, "legend.labelcolor": ink, "legend.framealpha": 0.0,
                   "font.size": 11.5, "svg.hashsalt": "llmprune", "axes.facecolor": "none"}  # fmt: skip
        with matplotlib.rc_context(colours), io.BytesIO() as file:
            figure(POINTS[theme]).savefig(file, format="svg", transparent=True, metadata={"Date": None})
            drawn[theme] = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Picture(title, text, drawn["light"], drawn["dark"])


def trade_offs(comparison: Comparison) -> tuple[list[Picture], list[str]]:
    """Quality against size and against speed, and in words what is left out because nothing was measured."""
    qualities = _qualities(comparison)
    if not qualities:
        return [], ["Quality: no figure was measured of two models in the same way."]
    pictures = [p for quality in qualities for p in _against_size(comparison, quality)]
    speeds = _speeds(comparison)
    missing = [] if pictures else ["Size: it is known of fewer than two models with a figure of quality."]
    fast = [p for quality in qualities for speed in speeds for p in _against_speed(comparison, quality, speed)]
    if not fast:
        missing.append("Speed: it was measured of fewer than two models in the same way, so nothing is plotted.")
    return pictures + fast, missing


def curves(one: Candidate) -> Picture | None:
    """The learning run of a candidate, if its masks were learned."""
    if not one.manifest or not one.manifest["curves"] or not one.manifest["widths"]:
        return None
    rows, units = one.manifest["curves"], {k["projection"]: k["before"] for k in one.manifest["widths"]["kinds"]}
    text = f"loss from {rows[0]['loss']:.4g} to {rows[-1]['loss']:.4g} over {len(rows)} recorded steps"
    return draw(one.name, text, lambda _: draw_curves(rows, units))


def _qualities(comparison: Comparison) -> list[Column]:
    """The perplexity that most models have, and the mean accuracy or, of a single task, its accuracy."""
    perplexities = [c for c in comparison.of_kind("perplexity") if c.figure == "perplexity" and len(c.cells) > 1]
    accuracies = [c for c in comparison.of_kind("task") if c.figure == "acc" and len(c.cells) > 1]
    means = [column for column in accuracies if column.name == MEAN]
    return [max(some, key=lambda c: len(c.cells)) for some in (perplexities, means or accuracies) if some]


def _speeds(comparison: Comparison) -> list[Column]:
    """Of each thing that was timed, the protocol that most models have; rather relative to dense, within one run."""
    timed = [c for c in comparison.of_kind("speed") if c.figure in SPEEDS and len(c.cells) > 1]
    names = dict.fromkeys(column.name for column in timed)
    return [
        max((c for c in timed if c.name == name), key=lambda c: (c.figure == SPEEDS[0], len(c.cells))) for name in names
    ]


def _against_size(comparison: Comparison, quality: Column) -> list[Picture]:
    axes = {
        "size on disk (MB)": [one.bytes for one in comparison.candidates],
        "parameters that are not zero (M)": [one.nonzero for one in comparison.candidates],
    }
    sizes = {label: {i: count / 1e6 for i, count in enumerate(row) if count} for label, row in axes.items()}
    return [p for label, values in sizes.items() for p in _scatter(comparison, quality, label, values)]


def _against_speed(comparison: Comparison, quality: Column, speed: Column) -> list[Picture]:
    values = {i: cell.value for i, cell in speed.cells.items() if cell.value is not None}
    return _scatter(comparison, quality, speed.heading, values)


def _scatter(comparison: Comparison, quality: Column, label: str, values: Mapping[int, float]) -> list[Picture]:
    """One plot, or none where fewer than two models have both figures; `values` by the candidate's place."""
    points = []
    for i, cell in quality.cells.items():
        one = comparison.candidates[i]
        if i in values and cell.value is not None:
            points.append(Point(one.name, values[i], cell.value, one.dense))
    if len(points) < 2:
        return []
    text = "; ".join(f"{p.name}: {p.x:.4g}, {p.y:.4g}" for p in points)
    title = f"{quality.heading} against {label}"
    return [draw(title, text, lambda colour: _points(points, label, quality, colour))]


def _points(points: Sequence[Point], label: str, quality: Column, colour: str) -> Figure:
    """Points with their names in a column at the right, apart from each other, each tied to its point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(4.8, max(3.2, 0.24 * len(points) + 1.0)), layout="constrained")
    axes: Any = figure.subplots()
    values = [p.y for p in points]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    for point in points:
        face = "none" if point.dense else colour
        axes.plot(point.x, point.y, marker="o", markersize=7, color=colour, markerfacecolor=face, linestyle="")
    axes.margins(x=0.12, y=0.08)
    arrow = {1: " (more is better)", -1: " (less is better)"}.get(quality.style.better, "")
    axes.set(xlabel=label, ylabel=quality.style.label + arrow)
    axes.grid(alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, points)
    return figure


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside the plot in the order of the points' height."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    ranked = sorted(points, key=lambda p: (p.y, p.x))
    heights = [float(to_axes.transform((p.x, p.y))[1]) for p in ranked]
    for point, height in zip(ranked, _apart(heights, 1.06 / max(len(points), 11)), strict=True):
        name = point.name if len(point.name) <= 26 else point.name[:25] + "…"
        axes.annotate(name, (point.x, point.y), xytext=(1.04, height), textcoords="axes fraction", va="center",
                      fontsize=10.5, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.5, "shrinkB": 4,
                                  "color": axes.xaxis.label.get_color(), "relpos": (0, 0.5)})  # fmt: skip


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Sorted heights within [0, 1], moved as little as keeps them `least` apart."""
    placed: list[float] = []
    for i, height in enumerate(heights):
        floor = placed[-1] + least if i else 0.0
        placed.append(max(height, floor))
    ceiling = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - least
    return placed
