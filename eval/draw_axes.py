"""Draw the README's picture of the five axes: python eval/draw_axes.py

Each method is a path through them; what the methods choose is read from the code.
"""

from __future__ import annotations

from pathlib import Path

from llmprune.criteria import methods

AXES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("--method", "which weights\nlook cheapest", ("random", "magnitude", "wanda", "stade", "sparsegpt", "regress")),
    ("--refine", "exchange kept\nand pruned", ("none", "swap")),
    ("--compensation", "what moves\nafterwards", ("none", "bias", "least-squares")),
    ("--sequential", "measured before or\nbehind pruned sites", ("block", "site")),
    ("--target", "whose output\nto match", ("own", "dense")),
)
PATHS = {"magnitude": "tab:gray", "wanda": "tab:blue", "stade": "tab:green", "sparsegpt": "tab:orange",
         "regress": "tab:red"}  # fmt: skip


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10.5, 4.2))
    places: list[dict[str, float]] = []
    for x, (option, meaning, choices) in enumerate(AXES):
        places.append({choice: (i + 1) / (len(choices) + 1) for i, choice in enumerate(choices)})
        axis.plot([x, x], [0.02, 0.98], color="0.75", linewidth=1, zorder=1)
        axis.text(x, 1.13, option, ha="center", fontsize=11, family="monospace", weight="bold")
        axis.text(x, 1.02, meaning, ha="center", fontsize=9, color="0.35")
        for choice, y in places[-1].items():
            axis.text(x, y - 0.055, choice, ha="center", va="top", fontsize=9, zorder=4,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
            axis.plot(x, y, "o", color="0.6", markersize=5, zorder=2)
    for rank, (name, colour) in enumerate(PATHS.items()):
        method = methods()[name]
        chosen = (name, method.refine, method.compensation, method.sequential, method.target)
        offset = (rank - 2) * 0.014  # so that paths that coincide stay visible
        heights = [place[choice] + offset for place, choice in zip(places, chosen, strict=True)]
        width = 3.0 if name == "regress" else 1.8
        axis.plot(range(len(AXES)), heights, "-o", color=colour, linewidth=width, markersize=5, label=name, zorder=3)
    axis.set(xlim=(-0.45, len(AXES) - 0.55), ylim=(0, 1.2))
    axis.axis("off")
    axis.legend(loc="upper center", ncol=len(PATHS), frameon=False, bbox_to_anchor=(0.5, 0.02), fontsize=10)
    figure.savefig(Path(__file__).resolve().parent / "results" / "axes.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
