"""Time smaller widths against the dense model in turn: `make bench`.

The random Llama of bench_prune.py is cut to the same share in every block; only its widths matter here, so that units
go by magnitude. One window of 512 tokens is read at once (prefill), and one sequence is written token by token
(decode). Rows go to eval/results/smaller.csv, the table to the terminal.
"""

from __future__ import annotations

import copy
import csv
import time
from functools import partial
from typing import Any

from bench_prune import LENGTH, RESULTS, build, surroundings
from llmprune_eval.speed import ACTIONS, Load, alternate, figures, speedups
from llmprune_eval.terminal import table
from transformers import PreTrainedModel

from llmprune import PruneConfig, prune

SPARSITIES = (0.2, 0.35, 0.5)
TURNS, PROMPT, NEW = 9, 8, 64
LOADS = {"prefill": Load(1, LENGTH, 1), "decode": Load(1, PROMPT, NEW)}


def compare(dense: PreTrainedModel, smaller: PreTrainedModel) -> dict[str, Any]:
    """Rates of both, and the ratio with its range, each ratio taken within a turn."""
    row: dict[str, Any] = {}
    for name, load in LOADS.items():
        turns = alternate([partial(ACTIONS[name], model, load) for model in (smaller, dense)], TURNS)
        found, ratios = figures(turns, load.work(name)), speedups(turns)
        row |= {
            f"{name}_dense": found["dense_tokens_per_second"],
            f"{name}": found["tokens_per_second"],
            f"{name}_speedup": found["speedup"],
            f"{name}_min": min(ratios),
            f"{name}_max": max(ratios),
        }
    return row


def measure(dense: PreTrainedModel, sparsity: float) -> dict[str, Any]:
    """One row."""
    config = PruneConfig(method="magnitude", pattern="uniform", sparsity=sparsity)
    result = prune(copy.deepcopy(dense), config)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, result.model))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "sparsity": sparsity,
        "parameters_dense": before,
        "parameters": after,
        "parameter_ratio": before / after,
        **compare(dense, result.model),
        **surroundings(),
        "command": "python eval/bench_smaller.py",
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The table."""
    cells = [
        (f"{r['sparsity']:.0%}", f"{r['parameter_ratio']:.2f}",
         *(text for name in LOADS for text in (
             f"{r[f'{name}_dense']:.0f} -> {r[name]:.0f}",
             f"{r[f'{name}_speedup']:.2f} ({r[f'{name}_min']:.2f}-{r[f'{name}_max']:.2f})",
         )))
        for r in rows
    ]  # fmt: skip
    columns = ("removed", "fewer parameters", "prefill tokens/s", "speed-up", "decode tokens/s", "speed-up")
    title = f"Batch 1: a window of {LENGTH} tokens read, {NEW} tokens written; medians of {TURNS} turns (range)"
    return table(title, columns, cells)


def main() -> None:
    dense = build()
    rows = [measure(dense, sparsity) for sparsity in SPARSITIES]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "smaller.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
