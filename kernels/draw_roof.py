"""Draw kernels/roof.png: python kernels/draw_roof.py

How many times as fast as the dense layer a packed one can be, over the size of the layer, for one row of x; the
targets; and what was measured with one row, where kernels/results.csv has any. Needs no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune_kernels.benchmark import rows
from llmprune_kernels.benchmark.roof import Roof
from llmprune_kernels.benchmark.shapes import LAYERS, Layer, chosen

HERE = Path(__file__).resolve().parent
EXPECTED = Roof(3.0e12, 2.5)  # of an H100: its copy bandwidth, and an estimate of a launch's cost in a graph
TARGETS = ((30.0, 90.0, 1.45), (90.0, 150.0, 1.55), (150.0, 1000.0, 1.65))  # megabytes from, to; speed-up
SIZES = [10 ** (1 + step / 50) for step in range(101)]  # megabytes, 10 to 1000
MEASURED = {"decode": "tab:blue", "bitmap-rows": "tab:orange"}


def square(megabytes: float) -> Layer:
    """A layer of that size with as many inputs as outputs."""
    side = round((megabytes * 1e6 / 2) ** 0.5)
    return Layer("square", side, side)


def roof_of(measured: list[dict[str, str]]) -> tuple[Roof, str]:
    """The roof that was measured last, or the one expected of an H100, and what it is."""
    for row in reversed(measured):
        if row["copy_gigabytes_per_second"]:
            roof = Roof(float(row["copy_gigabytes_per_second"]) * 1e9, float(row["launch_microseconds"]))
            return roof, f"{row['gpu']}, measured: {roof.bandwidth / 1e12:.2f} TB/s, {roof.launch:.1f} µs per launch"
    return EXPECTED, f"{EXPECTED.bandwidth / 1e12:.1f} TB/s (H100), {EXPECTED.launch} µs per launch (estimate)"


def draw(table: Path, picture: Path) -> None:
    """Draw the roof and the table's measurements with one row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows.read(table) if row["rows"] == "1" and row["layer"] in LAYERS]
    roof, source = roof_of(measured)
    figure, axis = pyplot.subplots(figsize=(7.5, 3.8))
    axis.axhline(16 / 9, color="0.7", linewidth=1, linestyle=":")
    axis.text(10.5, 16 / 9 + 0.012, "16/9: bytes alone", fontsize=8, color="0.45")
    ceiling = [roof.ceiling(square(size), "2:4", 1) for size in SIZES]
    axis.plot(SIZES, ceiling, color="black", linewidth=1.8, label="ceiling, 2:4")
    for left, right, speedup in TARGETS:
        axis.plot([left, right], [speedup, speedup], color="tab:green", linewidth=2.2,
                  label="target, 2:4, 1 to 16 rows" if left == TARGETS[0][0] else None)  # fmt: skip
    axis.plot(SIZES[:1] + SIZES[-1:], [1.2, 1.2], color="tab:orange", linewidth=1.2, linestyle="--",
              label="target, any zeros, 1 row")  # fmt: skip
    layers = chosen(None)
    axis.plot([layer.megabytes for layer in layers], [roof.ceiling(layer, "2:4", 1) for layer in layers], "o",
              color="black", markersize=4, markerfacecolor="white", label="layers of the benchmark")  # fmt: skip
    _points(axis, measured)
    axis.set(xscale="log", xlim=(10, 1000), ylim=(0.9, 1.85), xlabel="dense layer, MB (16 bits)")
    axis.set_ylabel("speed-up over dense")
    axis.set_xticks([10, 30, 100, 300, 1000], labels=["10", "30", "100", "300", "1000"])
    axis.set_title(source, fontsize=9, loc="left")
    axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def _points(axis: Any, measured: list[dict[str, str]]) -> None:
    """What the package's kernels reached."""
    for kernel, colour in MEASURED.items():
        points = [(float(r["megabytes"]), float(r["speedup"])) for r in measured if r["kernel"] == kernel]
        if points:
            axis.plot(*zip(*points, strict=True), "D", color=colour, markersize=5, label=f"measured: {kernel}")


if __name__ == "__main__":
    draw(HERE / "results.csv", HERE / "roof.png")
