"""Time smaller widths against the dense model in turn: `make bench`.

The random Llama of bench_prune.py is cut to the same share in every block; only its widths matter here, so that units
go by magnitude. One window of 512 tokens is read at once (prefill), and one sequence is written token by token
(decode). Rows go to eval/results/smaller.csv, the table to the terminal.
"""

from __future__ import annotations

import copy
import csv
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_prune import LENGTH, RESULTS, build, surroundings
from llmprune_eval.terminal import table
from torch import Tensor
from transformers import PreTrainedModel

from llmprune import PruneConfig, prune

SPARSITIES = (0.2, 0.35, 0.5)
TURNS, PROMPT, NEW = 9, 8, 64
ACTIONS = ("prefill", "decode")


@torch.no_grad()
def prefill(model: Any) -> int:
    """Read one window; returns its tokens."""
    model(input_ids=torch.arange(LENGTH)[None], use_cache=False)
    return LENGTH


def decode(model: Any) -> int:
    """Write a sequence; returns its tokens."""
    write(model, torch.arange(PROMPT)[None], NEW)
    return NEW


def write(model: Any, prompt: Tensor, tokens: int) -> None:
    """Exactly so many tokens after a prompt [1, n], greedily."""
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                   do_sample=False, pad_token_id=0)  # fmt: skip


def rate(action: Callable[[Any], int], model: PreTrainedModel) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    tokens = action(model)
    return tokens / (time.perf_counter() - start)


def compare(dense: PreTrainedModel, smaller: PreTrainedModel) -> dict[str, Any]:
    """Rates of both, and the ratio with its range, each ratio taken within a turn."""
    row: dict[str, Any] = {}
    for name, action in zip(ACTIONS, (prefill, decode), strict=True):
        rate(action, dense), rate(action, smaller)  # warm up
        turns = [(rate(action, dense), rate(action, smaller)) for _ in range(TURNS)]
        ratios = sorted(ours / theirs for theirs, ours in turns)
        row |= {
            f"{name}_dense": statistics.median(theirs for theirs, _ in turns),
            f"{name}": statistics.median(ours for _, ours in turns),
            f"{name}_speedup": statistics.median(ratios),
            f"{name}_min": ratios[0],
            f"{name}_max": ratios[-1],
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
         *(text for name in ACTIONS for text in (
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
