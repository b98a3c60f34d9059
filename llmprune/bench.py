"""What `llmprune bench` does: load, time in turn, keep every figure as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llmprune_eval.devices import resolve_device
from llmprune_eval.loading import load_model
from llmprune_eval.peaks import MEMORY, allocated_peaks, resident_peaks
from llmprune_eval.result import Result, check_place, describe_model, own_file
from llmprune_eval.speed import Load, Peaks, measure_speed
from llmprune_eval.windows import model_positions

from llmprune.errors import InputError, memory_ran_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_bench(
    names: Sequence[str],
    loads: Sequence[Load],
    turns: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    output: Path | None,
) -> Result:
    """Time one model, or one and the dense one it is compared with; returns all that is known of the first.

    Args:
        names: folders or Hub names; the dense model second.
        loads: the smaller batches first.
        output: the result's file; None means the model's folder, if llmprune has written that.

    Raises:
        InputError: a model cannot be loaded or timed, or the result cannot be kept.
    """
    place = resolve_device(device)
    if place.type not in MEMORY:
        raise InputError(f"--device {device}: speed and memory are measured on {' and '.join(MEMORY)} only")
    output = output or own_file(names[0])
    check_place(output)
    models = [load_model(name, dtype, trust_remote_code, place) for name in names]
    for model in models:
        for load in loads:
            load.check(model_positions(model))
    described = [describe_model(name, model) for name, model in zip(names, models, strict=True)]
    against = {key: described[1][key] for key in ("name", "weights_sha256", "dtype")} if len(names) > 1 else None
    result = Result.open(output, described[0])
    facts = {"against": against, "memory": MEMORY[place.type]}
    try:
        peaks = _peaks(names, models, loads, place, dtype, trust_remote_code)
        for load, of_load in zip(loads, peaks, strict=True):
            for part in measure_speed(models, load, turns, of_load, facts):
                result.add(part)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        raise InputError(
            f"no memory is left for {' and '.join(names)} ({str(error).partition('. ')[0][:120]}): pass smaller "
            "--batch-sizes, a shorter --prompt, or --dtype bfloat16"
        ) from error
    return result


def _peaks(
    names: Sequence[str],
    models: Sequence[PreTrainedModel],
    loads: Sequence[Load],
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
) -> list[list[Peaks]]:
    """Memory [loads][models]."""
    if device.type == "cuda":
        return [[allocated_peaks(model, load) for model in models] for load in loads]
    each: list[list[Any]] = [
        resident_peaks(name, loads, dtype=dtype, trust_remote_code=trust_remote_code) for name in names
    ]
    return [list(row) for row in zip(*each, strict=True)]
