"""`llmprune bench`: prefill, decode and peak memory on the device at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from llmprune_eval.options import Debug, Device, Dtype, Json, Model, Remote

from llmprune.errors import InputError
from llmprune.terminal import say

Sizes = Annotated[str, typer.Option("--batch-sizes", help="Sequences side by side, as in 1,4.")]


def bench_command(
    model: Model,
    against: Annotated[str | None, typer.Option(help="The dense model, timed in turn with it.")] = None,
    batch_sizes: Sizes = "1,4",
    prompt: Annotated[int, typer.Option(help="Tokens read at once.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens written one by one.")] = 32,
    turns: Annotated[int, typer.Option(help="How often each is timed, after one turn to warm up.")] = 5,
    graph: Annotated[bool | None, typer.Option("--graph/--no-graph", help="Replay each written token from one CUDA "
                                               "graph, as servers do [on a GPU]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File for the result [in the folder, if "
                                                "llmprune has written that]")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Time prefill and decode, and measure peak memory; with --against in turn with the dense model."""
    from llmprune_eval.devices import resolve_device
    from llmprune_eval.speed import Load

    from llmprune.bench import run_bench
    from llmprune.tables import speed_text

    if turns < 1:
        raise InputError(f"turns is {turns}: at least 1 is needed")
    place = resolve_device(device)
    if graph and place.type != "cuda":
        raise InputError(f"--graph: CUDA graphs run on NVIDIA GPUs, not on {place}: leave it out")
    on_graph = place.type == "cuda" if graph is None else graph
    loads = [Load(size, prompt, new_tokens, on_graph) for size in _sizes(batch_sizes)]
    names = [model] if against is None else [model, against]
    result = run_bench(names, loads, turns, device, dtype, trust_remote_code, output)
    say(json.dumps(result.as_dict(), indent=1) if as_json else speed_text(result, 2 * len(loads)))


def _sizes(text: str) -> list[int]:
    """1,4 as numbers, each once, the smallest first."""
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise InputError(f"batch sizes '{text}' are none: give numbers with commas between, as in 1,4") from error
