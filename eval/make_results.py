"""Prune the real models of ../shared by every method and pattern, score them, and write eval/results/.

    python eval/make_results.py [--model NAME ...] [--row NAME ...] [--pattern P ...]

Rows already in quality.csv are replaced by those of this run; the tables in quality.md and the picture are
drawn from the whole file. Each row is what the two commands in it do.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmprune_eval import evaluate
from llmprune_eval.loading import load_model, load_tokenizer
from llmprune_eval.surroundings import versions
from llmprune_eval.text import joined_windows, open_text
from torch import Tensor

from llmprune import InputError, PruneConfig, prune

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
RESULTS = HERE / "results"
FIELDS = (
    "model method pattern perplexity dense_perplexity kl top1_agreement sparsity decoder_share windows tokens "
    "calibration_sha256 prune_command eval_command versions"
).split()
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("random", "magnitude", "wanda", "ria", "stade", "stade-w", "sparsegpt")},
    "wanda + least squares": {"method": "wanda", "compensation": "least-squares"},
    "stade + least squares": {"method": "stade", "compensation": "least-squares"},
    "sparsegpt + bias": {"method": "sparsegpt", "compensation": "bias"},
    "regress": {"method": "regress"},
    "regress with mix 1": {"method": "regress", "mix": 1.0},
    "regress without swaps": {"method": "regress", "refine": "none"},
    "regress without dense target": {"method": "regress", "target": "own"},
    "regress without residual": {"method": "regress", "residual": 0.0},
    "regress without site order": {"method": "regress", "sequential": "block"},
}
"""What is done to the model, as the options of `llmprune prune`."""
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")


@dataclass(frozen=True)
class Task:
    """How one model is calibrated and scored. `divergence` also compares with the dense model."""

    model: str
    calibration: str
    evaluation: str
    windows: int
    length: int
    scored: int | None
    divergence: bool = True


STORIES = ("text/tinystories-train.jsonl", "text/tinystories-val.jsonl", 64, 256, 150)
TASKS = (
    Task("stories260k-llama", *STORIES),
    Task("tinystories-llama-1m", *STORIES),
    Task("tinystories-opt-1m", *STORIES),
    Task("llama-3m", "c4:text/c4-calibration.jsonl", "wikitext2:text/wikitext2-raw-test.txt", 64, 512, None, False),
)


def located(spec: str) -> str:
    """A dataset spec with its file below ../shared."""
    name, colon, path = spec.rpartition(":")
    return f"{name}{colon}{SHARED / path}"


def evaluation_windows(task: Task) -> Tensor:
    """What `llmprune eval` scores."""
    source = open_text(located(task.evaluation), "test")
    tokenizer = load_tokenizer(str(SHARED / "models" / task.model))
    return joined_windows(source.texts, source.protocol.joiner, tokenizer, task.length)[: task.scored]


def commands(task: Task, options: dict[str, Any], pattern: str) -> tuple[str, str]:
    """The two commands that make a row."""
    how = f"--pattern {pattern}" if ":" in pattern else f"--sparsity {pattern}"
    words = " ".join(f"--{name} {value}" for name, value in options.items())
    first = (
        f"llmprune prune ../shared/models/{task.model} -o OUT {words} {how} "
        f"--dataset {_named(task.calibration)} --num-calibration-samples {task.windows} --max-seq-length {task.length}"
    )
    limit = f" --num-samples {task.scored}" if task.scored else ""
    against = f" --against ../shared/models/{task.model}" if task.divergence else ""
    second = f"llmprune eval OUT --dataset {_named(task.evaluation)} --max-seq-length {task.length}{limit}{against}"
    return first, second


def _named(spec: str) -> str:
    name, colon, path = spec.rpartition(":")
    return f"{name}{colon}../shared/{path}"


def asked(pattern: str) -> dict[str, Any]:
    """A pattern of PATTERNS as options of PruneConfig."""
    return {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}


def run(task: Task, wanted: Sequence[str], patterns: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of one model."""
    folder = str(SHARED / "models" / task.model)
    windows, tokenizer, dense = evaluation_windows(task), load_tokenizer(folder), load_model(folder)
    base = evaluate(dense, windows)
    common = {"model": task.model, "dense_perplexity": base.perplexity, "windows": base.windows, "tokens": base.tokens}
    common["versions"] = " ".join(f"{k}={v}" for k, v in versions().items())
    _, eval_command = commands(task, {}, "0.5")
    rows = [{**common, "method": "dense", "perplexity": base.perplexity, "eval_command": eval_command}]
    for pattern, name in itertools.product(patterns, wanted):
        config = PruneConfig(
            dataset=located(task.calibration),
            num_calibration_samples=task.windows,
            max_seq_length=task.length,
            num_holdout_samples=0,
            **ROWS[name],
            **asked(pattern),
        )
        try:
            result = prune(load_model(folder), config, tokenizer=tokenizer)
        except InputError as error:
            print(f"{task.model} {name} {pattern}: {error}", flush=True)
            continue
        scores = evaluate(result.model, windows, against=dense if task.divergence else None)
        prune_command, eval_command = commands(task, ROWS[name], pattern)
        rows.append(
            {
                **common,
                **scores.as_dict(),
                "dense_perplexity": base.perplexity,
                "method": name,
                "pattern": pattern,
                "sparsity": result.report.sparsity,
                "decoder_share": result.report.decoder_share,
                "calibration_sha256": (result.report.calibration or {})["sha256"],
                "prune_command": prune_command,
                "eval_command": eval_command,
            }
        )
        print(f"{task.model:22} {name:28} {pattern:4} {scores.perplexity:10.3f}", flush=True)
    return rows


def merged(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows on disk with the new ones in place of theirs, in the order of the tables."""
    path = RESULTS / "quality.csv"
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["model"], row.get("pattern", ""), row["method"]

    rows = list({**{key(row): row for row in old}, **{key(row): row for row in new}}.values())
    models, order = [task.model for task in TASKS], ["dense", *ROWS]
    patterns = ["", *PATTERNS]
    rank = lambda row: (models.index(row["model"]), patterns.index(row.get("pattern", "")), order.index(row["method"]))  # noqa: E731
    return sorted(rows, key=rank)


def write(rows: list[dict[str, Any]]) -> None:
    """quality.csv, the tables of quality.md, and quality.png."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    parts = [
        "# Perplexity after pruning\n",
        "Made by `python eval/make_results.py`. Every row's two commands, the hash of its calibration tokens and the "
        "versions stand in `quality.csv`.\nSame tokens for all rows of a table; lower is better; best of a column in "
        "bold. A dash: not run, or the width is not divisible.\n",
    ]
    for task in TASKS:
        own = [row for row in rows if row["model"] == task.model]
        if own:
            parts.append(_markdown(task, own))
    (RESULTS / "quality.md").write_text("\n".join(parts), encoding="utf-8")
    _picture(rows)


def _markdown(task: Task, rows: list[dict[str, Any]]) -> str:
    value = {(row["method"], row.get("pattern", "")): float(row["perplexity"]) for row in rows}
    dense = next(row for row in rows if row["method"] == "dense")
    best = {p: min((v for (_, q), v in value.items() if q == p), default=0.0) for p in PATTERNS}
    head = (
        f"## {task.model}\n\nCalibrated on {task.windows} windows of {task.length} tokens of `{task.calibration}`, "
        f"scored on {dense['windows']} windows\nof `{task.evaluation}` ({dense['tokens']} tokens).\n"
    )
    lines = [head, f"| method | {' | '.join(PATTERNS)} |", "|---|" + "---|" * len(PATTERNS)]
    lines.append("| dense |" + f" {value['dense', '']:.2f} |" * len(PATTERNS))
    for method in ROWS:
        cells = []
        for pattern in PATTERNS:
            figure = value.get((method, pattern))
            text = "-" if figure is None else f"{figure:.2f}" if figure < 1000 else f"{figure:.0f}"
            cells.append(f"**{text}**" if figure is not None and figure == best[pattern] else text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _picture(rows: list[dict[str, Any]]) -> None:
    """Perplexity as a multiple of dense, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [task.model for task in TASKS if any(row["model"] == task.model for row in rows)]
    # Random would press all others into one line; the ablation is for the table.
    shown = [name for name in ROWS if name != "random" and not name.startswith("regress with")]
    figure, axes = pyplot.subplots(1, len(models), figsize=(3.6 * len(models) + 1, 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for i, method in enumerate(shown):
            points = [
                (PATTERNS.index(row["pattern"]) + (i / (len(shown) - 1) - 0.5) * 0.5,
                 float(row["perplexity"]) / float(row["dense_perplexity"]))
                for row in rows
                if row["model"] == model and row["method"] == method
            ]  # fmt: skip
            axis.plot(*zip(*points, strict=True), "o", label=method, markersize=7)
        axis.set(title=model, yscale="log", xlim=(-0.5, len(PATTERNS) - 0.5),
                 xticks=range(len(PATTERNS)), xticklabels=PATTERNS)  # fmt: skip
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.grid(alpha=0.3, which="both", axis="y")
    axes[0][0].set_ylabel("perplexity / dense (random: off the scale)")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.supxlabel("pruned share, or n:m kept", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "quality.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune and score the models of ../shared.")
    parser.add_argument("--model", action="append", choices=[task.model for task in TASKS])
    parser.add_argument("--row", action="append", choices=list(ROWS))
    parser.add_argument("--pattern", action="append", choices=PATTERNS)
    chosen = parser.parse_args()
    if not SHARED.is_dir():
        parser.error(f"{SHARED} is missing: the models and texts are not part of this repository")
    torch.manual_seed(0)
    for task in TASKS:
        if not chosen.model or task.model in chosen.model:
            write(merged(run(task, chosen.row or list(ROWS), chosen.pattern or PATTERNS)))


if __name__ == "__main__":
    main()
