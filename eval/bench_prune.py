"""Time pruning against a plain dense forward pass over the same windows: `make bench`.

A random Llama of 25M parameters, 128 windows of 512 tokens, batches of 8. Each method runs in a process of
its own (so that the peak memory is its own), dense forward pass and pruning in turn, three times; ratios are
taken within a turn. Pruning takes fewer windows at a time on a CPU, which is faster; so that this gain can be
told from the work itself, the dense pass is also timed in such small batches. Rows go to
eval/results/bench.csv, the table to the terminal.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llmprune_eval.surroundings import peak_memory, versions
from llmprune_eval.terminal import table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune import PruneConfig, prune
from llmprune.walk import CPU_TOKENS

RESULTS = Path(__file__).resolve().parent / "results"
CASES = (("wanda", "block"), ("stade", "block"), ("sparsegpt", "block"), ("wanda", "site"), ("regress", "site"))
WINDOWS, LENGTH, BATCH, TURNS = 128, 512, 8, 3
SMALL_BATCH = CPU_TOKENS // LENGTH
PHASES = ("collect", "prune", "propagate", "other")
FIELDS = (
    "date method sequential pattern dense_seconds prune_seconds ratio ratio_min ratio_max ratio_small_batches "
    "collect prune propagate other peak_rss_gb dense_rss_gb threads machine versions command"
).split()


def build() -> PreTrainedModel:
    """25.7M parameters: hidden 512, 8 blocks, 8 heads over 4 key/value heads, ffn 1408, vocabulary 2048."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1408,
        vocab_size=2048,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


@torch.no_grad()
def dense_seconds(model: PreTrainedModel, windows: torch.Tensor, batch_size: int = BATCH) -> float:
    """One plain forward pass over all windows."""
    start = time.perf_counter()
    for batch in windows.split(batch_size):
        model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


def surroundings() -> dict[str, Any]:
    """Of what a timing depends on."""
    return {
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": " ".join(f"{name}={value}" for name, value in versions().items()),
    }


def measure(method: str, sequential: str, pattern: str) -> dict[str, Any]:
    """All turns of one method."""
    model = build()
    windows = torch.randint(0, 2048, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    config = PruneConfig(method=method, sequential=sequential, pattern=pattern, batch_size=BATCH)
    dense_seconds(model, windows[:BATCH])  # warm up
    turns = []
    dense_rss = 0
    for _ in range(TURNS):
        dense = dense_seconds(model, windows)
        dense_rss = dense_rss or peak_memory()
        small = dense_seconds(model, windows, SMALL_BATCH)
        victim = copy.deepcopy(model)
        start = time.perf_counter()
        report = prune(victim, config, tokens=windows).report
        turns.append((dense, small, time.perf_counter() - start, report.seconds))
    ratios = sorted(pruned / dense for dense, _, pruned, _ in turns)
    middle = {phase: statistics.median(seconds[phase] for *_, seconds in turns) for phase in PHASES}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "method": method,
        "sequential": sequential,
        "pattern": pattern,
        "dense_seconds": statistics.median(dense for dense, *_ in turns),
        "prune_seconds": statistics.median(pruned for *_, pruned, _ in turns),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "ratio_small_batches": statistics.median(pruned / small for _, small, pruned, _ in turns),
        **middle,
        "peak_rss_gb": peak_memory() / 1e9,
        "dense_rss_gb": dense_rss / 1e9,
        **surroundings(),
        "command": f"python eval/bench_prune.py --method {method} --sequential {sequential} --pattern {pattern}",
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The table: where the time goes, in units of the dense forward pass."""
    cells = [
        (r["method"], r["sequential"], f"{r['dense_seconds']:.1f}", f"{r['prune_seconds']:.1f}", f"{r['ratio']:.2f}",
         f"{r['ratio_min']:.2f}-{r['ratio_max']:.2f}", f"{r['ratio_small_batches']:.2f}",
         *(f"{r[p] / r['dense_seconds']:.3f}" for p in PHASES),
         f"{r['peak_rss_gb']:.2f}")
        for r in rows
    ]  # fmt: skip
    columns = ("method", "order", "dense s", "prune s", "ratio", "range", f"by {SMALL_BATCH}s", *PHASES, "RSS GB")
    title = (
        f"{WINDOWS} windows of {LENGTH} tokens; medians of {TURNS}; ratio and phases in units of the dense pass in "
        f"batches of {BATCH}, 'by {SMALL_BATCH}s': of {SMALL_BATCH}"
    )
    return table(title, columns, cells)


def record(row: dict[str, Any]) -> None:
    """Add a row to bench.csv."""
    path = RESULTS / "bench.csv"
    RESULTS.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time pruning against a dense forward pass.")
    parser.add_argument("--method", help="time this one only")
    parser.add_argument("--sequential", default="block", choices=["block", "site"], help="with --method")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measure(chosen.method, chosen.sequential, chosen.pattern)))
        return
    rows = []
    for method, sequential in [(chosen.method, chosen.sequential)] if chosen.method else CASES:
        command = [sys.executable, __file__, "--child", "--method", method, "--sequential", sequential]
        command += ["--pattern", chosen.pattern]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        record(rows[-1])
        print(show(rows), flush=True)


if __name__ == "__main__":
    main()
