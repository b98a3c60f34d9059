"""One layer: every contestant against float64 first, and only then against the clock."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune_kernels.benchmark.contestants import Contestant
from llmprune_kernels.benchmark.roof import FEW_ROWS, Roof, weight_bytes
from llmprune_kernels.benchmark.shapes import Layer
from llmprune_kernels.benchmark.timing import GRAPH_BYTES, Recorder, Run, copies, rounds
from llmprune_kernels.launch import first_line, trouble

REPEATS = 20
WORST = 4  # units in the last place, of the larger of an output and the outputs' root mean square


@dataclass(frozen=True)
class Error:
    """How far an answer is from float64.

    Attributes:
        relative: Frobenius norm of the difference over that of the truth.
        worst: largest difference of one output, over that output plus the root mean square of all.
    """

    relative: float
    worst: float

    @classmethod
    def of(cls, answer: Tensor, truth: Tensor) -> Error:
        """Of an answer [rows, out]; NaN stays NaN."""
        difference = (answer.double() - truth).abs()
        size = truth.square().mean().sqrt()
        relative = difference.square().mean().sqrt() / size
        return cls(float(relative), float((difference / (truth.abs() + size)).max()))

    def acceptable(self, dense: Error, dtype: torch.dtype) -> bool:
        """No larger than twice the dense product's, and no single output wrong; NaN is not acceptable."""
        unit = torch.finfo(dtype).eps
        return self.relative <= max(2 * dense.relative, unit / 8) and self.worst <= WORST * unit


@dataclass(frozen=True)
class Machine:
    """What a contest runs on.

    Attributes:
        record: how calls are run and timed.
        roof: of the device; None where there is none (a CPU).
        l2: bytes of its cache.
        memory: bytes that copies of one weight may take.
        graph_bytes: weights that are read in one timing of few rows.
    """

    record: Recorder
    roof: Roof | None
    l2: int
    memory: int
    graph_bytes: int = GRAPH_BYTES


@dataclass(frozen=True)
class Refusal:
    """A contestant that gets no figure, and why."""

    layer: str
    rows: int
    kernel: str
    reason: str


def half_of(weight: Tensor, form: str) -> Tensor:
    """The weight [out, in] with its smaller half zero: of every four ("2:4"), or of every row ("bitmap")."""
    if form == "2:4":
        groups: Tensor = weight.unflatten(1, (-1, 4))
        return groups.scatter(2, groups.abs().argsort(2)[..., :2], 0.0).flatten(1)
    return torch.where(weight.abs() < weight.abs().float().median(1, keepdim=True).values, 0, weight)


def contest(
    layer: Layer, weight: Tensor, rows: Sequence[int], contestants: Sequence[Contestant], machine: Machine
) -> Iterator[dict[str, Any] | Refusal]:
    """Rows of the table, as they are measured.

    Args:
        weight: [out, in] with its zeros.
        contestants: the first is the dense product that the others are compared with.
    """
    inputs = {count: torch.randn(count, layer.inputs, device=weight.device).to(weight.dtype) for count in rows}
    exact = weight.double().t()
    truths = {count: x.double() @ exact for count, x in inputs.items()}
    del exact
    dense: dict[int, tuple[Error, float]] = {}
    for contestant in contestants:
        if not any(map(contestant.takes, rows)):
            continue
        try:
            tensors = _copies(contestant, layer, weight, machine)
        except trouble() as failure:
            yield Refusal(layer.name, 0, contestant.name, f"cannot hold the weight: {first_line(failure)}")
            continue
        for count in filter(contestant.takes, rows):
            try:
                run, error = _answer(contestant, layer, inputs[count], truths[count], tensors, machine)
            except trouble() as failure:
                yield Refusal(layer.name, count, contestant.name, f"did not run: {first_line(failure)}")
                continue
            baseline, dense_time = dense.get(count, (error, math.nan))
            if not error.acceptable(baseline, weight.dtype):
                yield Refusal(layer.name, count, contestant.name, f"wrong: {error}, the dense product's is {baseline}")
                continue
            times = run.microseconds(REPEATS)
            if contestant is contestants[0]:
                dense_time = float(np.median(times))
                dense[count] = error, dense_time
            yield {
                **_figures(layer, contestant, count, times, dense_time, machine.roof),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "copies": len(tensors),
                "relative_error": error.relative,
                "dense_error": baseline.relative,
            }
            del run


def _copies(contestant: Contestant, layer: Layer, weight: Tensor, machine: Machine) -> list[list[Tensor]]:
    """The contestant's tensors, as often as they are rotated."""
    first = list(contestant.make(weight))
    count = copies(weight_bytes(layer, contestant.form), machine.l2, machine.memory)
    return [first, *([tensor.clone() for tensor in first] for _ in range(count - 1))]


def _answer(
    contestant: Contestant, layer: Layer, x: Tensor, truth: Tensor, tensors: list[list[Tensor]], machine: Machine
) -> tuple[Run, Error]:
    """All copies recorded, and the largest error of any of them."""
    calls = [functools.partial(contestant.multiply, x, own, layer.outputs) for own in tensors]
    turns = rounds(weight_bytes(layer, contestant.form), len(tensors), machine.graph_bytes) if len(x) <= FEW_ROWS else 1
    run = machine.record(calls * turns)
    errors = [Error.of(answer, truth) for answer in run.answers()[-len(tensors) :]]
    broken = [error for error in errors if not math.isfinite(error.worst)]
    return run, (broken or [max(errors, key=lambda error: error.worst)])[0]


def _figures(
    layer: Layer, contestant: Contestant, rows: int, times: list[float], dense: float, roof: Roof | None
) -> dict[str, Any]:
    """The measured columns; those that ask for a roof only where there is one and bytes decide."""
    low, median, high = (float(value) for value in np.percentile(times, [10, 50, 90]))
    rate = weight_bytes(layer, contestant.form) / median * 1e-3
    figures: dict[str, Any] = {
        "layer": layer.name,
        "outputs": layer.outputs,
        "inputs": layer.inputs,
        "megabytes": layer.megabytes,
        "rows": rows,
        "kernel": contestant.name,
        "microseconds": median,
        "p10": low,
        "p90": high,
        "gigabytes_per_second": rate,
        "speedup": dense / median,
    }
    if roof is not None:
        figures |= {"copy_gigabytes_per_second": roof.bandwidth * 1e-9, "launch_microseconds": roof.launch}
        if rows <= FEW_ROWS:
            figures |= {
                "share_of_copy": rate * 1e9 / roof.bandwidth,
                "ceiling": roof.ceiling(layer, contestant.form, rows),
                "share_of_roof": roof.microseconds(layer, contestant.form, rows) / median,
            }
    return figures
