"""How much calibration text regression needs, and of which kind: python eval/calibration_study.py

The models of stories, calibrated on 16, 64 and 256 windows of stories and of web text, scored on stories.
Writes results/calibration.csv and calibration.md.
"""

from __future__ import annotations

import csv
import itertools
from typing import Any

import torch
from llmprune_eval import evaluate
from llmprune_eval.loading import load_model, load_tokenizer
from make_results import RESULTS, SHARED, TASKS, asked, commands, evaluation_windows, located

from llmprune import PruneConfig, prune

MODELS = ("stories260k-llama", "tinystories-llama-1m", "tinystories-opt-1m")
TEXTS = {"stories": "text/tinystories-train.jsonl", "web": "text/c4-calibration.jsonl"}
WINDOWS = (16, 64, 256)
METHODS = ("wanda", "sparsegpt", "regress")
PATTERNS = ("0.5", "2:4")


def rows_of(model: str) -> list[dict[str, Any]]:
    """Every combination for one model."""
    task = next(task for task in TASKS if task.model == model)
    folder = str(SHARED / "models" / model)
    tokenizer, scored = load_tokenizer(folder), evaluation_windows(task)
    dense = evaluate(load_model(folder), scored).perplexity
    rows = []
    for text, windows, method, pattern in itertools.product(TEXTS, WINDOWS, METHODS, PATTERNS):
        config = PruneConfig(
            method=method,
            dataset=located(TEXTS[text]),
            num_calibration_samples=windows,
            max_seq_length=task.length,
            num_holdout_samples=0,
            **asked(pattern),
        )
        perplexity = evaluate(prune(load_model(folder), config, tokenizer=tokenizer).model, scored).perplexity
        command, _ = commands(task, {"method": method}, pattern)
        command = command.replace(task.calibration, TEXTS[text]).replace(
            f"samples {task.windows}", f"samples {windows}"
        )
        rows.append({"model": model, "calibration": text, "windows": windows, "method": method, "pattern": pattern,
                     "perplexity": perplexity, "dense_perplexity": dense, "prune_command": command})  # fmt: skip
        print(f"{model:22} {text:8} {windows:4} {method:10} {pattern:4} {perplexity:9.3f}", flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table a model: a line for each text and method."""
    lines = [
        "# Calibration text: how much, and of which kind",
        "",
        "Made by `python eval/calibration_study.py`; windows of 256 tokens, scored as in `quality.md`; every row's "
        "command stands in\n`calibration.csv`. Lower is better.",
    ]
    for model in MODELS:
        own = {
            tuple(r[k] for k in ("calibration", "windows", "method", "pattern")): r for r in rows if r["model"] == model
        }
        dense = next(iter(own.values()))["dense_perplexity"]
        head = [f"{pattern}, {windows}" for pattern in PATTERNS for windows in WINDOWS]
        lines += ["", f"## {model} (dense {dense:.2f})", "", f"| text | method | {' | '.join(head)} |"]
        lines += ["|---|---|" + "---|" * len(head)]
        for text, method in itertools.product(TEXTS, METHODS):
            cells = [f"{own[text, w, method, p]['perplexity']:.2f}" for p in PATTERNS for w in WINDOWS]
            lines.append(f"| {text} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.manual_seed(0)
    rows = [row for model in MODELS for row in rows_of(model)]
    with (RESULTS / "calibration.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (RESULTS / "calibration.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
