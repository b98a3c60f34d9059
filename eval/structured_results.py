"""Cut the real models of ../shared to smaller widths by every unit score, and score what is left.

    python eval/structured_results.py [--model NAME ...] [--row NAME ...] [--sparsity S ...]

Rows already in structured.csv are replaced by those of this run; the tables in structured.md and the picture are drawn
from the whole file. Speeds are measured against the dense model in turn, and mean something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from llmprune_eval import evaluate
from llmprune_eval.loading import load_model, load_tokenizer
from llmprune_eval.speed import ACTIONS, Load, alternate, speedups
from llmprune_eval.surroundings import versions
from make_results import RESULTS, SHARED, Task, commands, evaluation_windows, located
from make_results import TASKS as WHOLE
from torch import Tensor
from transformers import PreTrainedModel

from llmprune import PruneConfig, prune
from llmprune.structured.task import LearningOptions

TASKS = [replace(task, scored=task.scored or 200, divergence=True) for task in WHOLE]
"""Every row is compared with the dense model, so that a long text is scored in part."""
SPARSITIES = ("0.2", "0.35", "0.5")
SCORES = ("random", "magnitude", "wanda", "stade", "taylor", "obs", "maskprune")
ADAPTERS = LearningOptions(ce=0.1, hidden=0.1, lora_rank=8)
REGRESSION = {"compensation": "least-squares", "target": "dense", "sequential": "site"}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in SCORES},
    "stade without bias": {"method": "stade", "compensation": "none"},
    **{f"{name} + least squares": {"method": name, "compensation": "least-squares"} for name in SCORES},
    "regress": {"method": "regress"},
    "obs + regression": {"method": "obs", **REGRESSION},
    "maskprune + LoRA": {"method": "maskprune", "learning": ADAPTERS},
}
FIELDS = (
    "model method sparsity perplexity dense_perplexity kl top1_agreement decoder_share parameters dense_parameters "
    "bytes widths prune_seconds dense_pass_seconds prefill_speedup decode_speedup windows tokens calibration_sha256 "
    "prune_command eval_command versions"
).split()
TURNS, PROMPT, NEW = 5, 256, 32


def run(task: Task, wanted: list[str], sparsities: list[str]) -> Iterator[dict[str, Any]]:
    """All rows of one model, each as soon as it is there."""
    folder = str(SHARED / "models" / task.model)
    windows, tokenizer, dense = evaluation_windows(task), load_tokenizer(folder), load_model(folder)
    base = evaluate(dense, windows)
    common = {"model": task.model, "dense_perplexity": base.perplexity, "windows": base.windows, "tokens": base.tokens,
              "dense_parameters": sum(p.numel() for p in dense.parameters()),
              "versions": " ".join(f"{k}={v}" for k, v in versions().items())}  # fmt: skip
    yield {**common, "method": "dense", "perplexity": base.perplexity, "parameters": common["dense_parameters"]}
    for sparsity, name in itertools.product(sparsities, wanted):
        config = PruneConfig(
            dataset=located(task.calibration),
            num_calibration_samples=task.windows,
            max_seq_length=task.length,
            num_holdout_samples=0,
            pattern="uniform",
            sparsity=float(sparsity),
            **ROWS[name],
        )
        start = time.perf_counter()
        result = prune(load_model(folder), config, tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        scores = evaluate(result.model, windows, against=dense)
        yield {**common, **scores.as_dict(), **_facts(result, dense, windows), "method": name,
               "dense_perplexity": base.perplexity, "sparsity": sparsity, "prune_seconds": seconds,
               **_commands(task, ROWS[name], sparsity)}  # fmt: skip
        print(f"{task.model:22} {name:28} {sparsity:4} {scores.perplexity:10.3f} {seconds:7.1f} s", flush=True)


def _facts(result: Any, dense: PreTrainedModel, windows: Tensor) -> dict[str, Any]:
    """Size and speed of a cut model."""
    model, report = result.model, result.report
    count = task_windows(report)
    return {
        "decoder_share": report.decoder_share,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "widths": " ".join(f"{k['after']}/{k['before']} {k['units']}" for k in report.widths["kinds"]),
        "calibration_sha256": report.calibration["sha256"],
        "dense_pass_seconds": _seconds(lambda: dense(input_ids=windows[:8], use_cache=False)) * count / 8,
        "prefill_speedup": _speedup(dense, model, "prefill", Load(1, PROMPT, NEW)),
        "decode_speedup": _speedup(dense, model, "decode", Load(1, 8, NEW)),
    }


def task_windows(report: Any) -> int:
    """How many calibration windows a run used."""
    return int(report.calibration["windows_used"])


@torch.no_grad()
def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _speedup(dense: PreTrainedModel, model: PreTrainedModel, name: str, load: Load) -> float:
    """How many times as fast `model` is: median of ratios taken in turn."""
    turns = alternate([partial(ACTIONS[name], one, load) for one in (model, dense)], TURNS)
    return statistics.median(speedups(turns))


def _commands(task: Task, options: dict[str, Any], sparsity: str) -> dict[str, str]:
    plain = {name: value for name, value in options.items() if name != "learning"}
    first, second = commands(task, plain, sparsity)
    if "learning" in options:
        first += " --lora-rank 8 --ce 0.1 --hidden-mse 0.1"
    return {"prune_command": f"{first} --pattern uniform", "eval_command": second}


def merged(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows on disk with the new ones in place of theirs, in the order of the tables."""
    path = RESULTS / "structured.csv"
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))

    def key(row: dict[str, Any]) -> tuple[int, str, int]:
        models, order = [task.model for task in TASKS], ["dense", *ROWS]
        return models.index(row["model"]), row.get("sparsity", ""), order.index(row["method"])

    found = {key(row): row for row in [*old, *new]}
    return [found[place] for place in sorted(found)]


def save(rows: list[dict[str, Any]]) -> None:
    """structured.csv."""
    with (RESULTS / "structured.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """structured.md and structured.png."""
    lines = ["# Smaller widths", "",
             "Made by `python eval/structured_results.py`. Every row's two commands, the hash of its calibration",
             "tokens, its widths, file size and measured speeds stand in `structured.csv`. Perplexity (KL to dense in",
             "nats) where the named share of the decoder's parameters is cut out; same tokens for all rows of a table;",
             "best in bold. Seconds: median over the columns.",
             ]  # fmt: skip
    for task in TASKS:
        own = [row for row in rows if row["model"] == task.model]
        if own:
            lines += _table(task.model, own)
    (RESULTS / "structured.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _picture(rows)


def _table(model: str, rows: list[dict[str, Any]]) -> list[str]:
    value = {(r["method"], r.get("sparsity", "")): r for r in rows}
    dense = value["dense", ""]
    lines = ["", f"## {model} (dense {float(dense['perplexity']):.2f}, {int(dense['parameters']):,} parameters)", ""]
    lines += [f"| method | {' | '.join(SPARSITIES)} | seconds |", "|---|" + "---|" * (len(SPARSITIES) + 1)]
    best = {s: min((float(r["perplexity"]) for (_, t), r in value.items() if t == s), default=0.0) for s in SPARSITIES}
    for name in ROWS:
        cells = []
        for sparsity in SPARSITIES:
            row = value.get((name, sparsity))
            text = "-" if row is None else f"{float(row['perplexity']):.2f} ({float(row['kl']):.2f})"
            cells.append(f"**{text}**" if row and float(row["perplexity"]) == best[sparsity] else text)
        seconds = [float(r["prune_seconds"]) for (n, s), r in value.items() if n == name and s]
        if seconds:
            lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.0f} |")
    return lines


def _picture(rows: list[dict[str, Any]]) -> None:
    """Perplexity as a multiple of dense against the share of parameters left, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [task.model for task in TASKS if any(row["model"] == task.model for row in rows)]
    figure, axes = pyplot.subplots(1, len(models), figsize=(4 * len(models) + 2, 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for name in (name for name in ROWS if not name.startswith("random")):
            colour = "black" if name == "regress" else f"C{SCORES.index(name.split()[0])}"
            points = sorted(
                (
                    int(r["parameters"]) / int(r["dense_parameters"]),
                    float(r["perplexity"]) / float(r["dense_perplexity"]),
                )
                for r in rows
                if r["model"] == model and r["method"] == name
            )
            if points:
                style = ":" if "regression" in name else "--" if "+" in name else "-"
                axis.plot(*zip(*points, strict=True), f"o{style}", label=name, color=colour, markersize=4)
        axis.set(title=model, yscale="log", xlabel="parameters / dense")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.grid(alpha=0.3, which="both", axis="y")
    axes[0][0].set_ylabel("perplexity / dense (random left out)")
    lines = {str(line.get_label()): line for axis in axes[0] for line in axis.get_lines()}  # not every model has all
    named = [lines[name] for name in ROWS if name in lines]
    axes[0][-1].legend(handles=named, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "structured.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the models of ../shared to smaller widths and score them.")
    parser.add_argument("--model", action="append", choices=[task.model for task in TASKS])
    parser.add_argument("--row", action="append", choices=list(ROWS))
    parser.add_argument("--sparsity", action="append", choices=SPARSITIES)
    chosen = parser.parse_args()
    if not SHARED.is_dir():
        parser.error(f"{SHARED} is missing: the models and texts are not part of this repository")
    torch.manual_seed(0)
    for task in TASKS:
        if not chosen.model or task.model in chosen.model:
            for row in run(task, chosen.row or list(ROWS), chosen.sparsity or list(SPARSITIES)):
                save(merged([row]))
    draw(merged([]))


if __name__ == "__main__":
    main()
