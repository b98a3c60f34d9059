"""CUDA graphs: captured so that nothing is left behind, and timed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@functools.cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures on a device: cuBLAS keeps a workspace for each stream that it has ever seen."""
    return torch.cuda.Stream(device)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """As torch.cuda.graph, which leaves its own stream behind where a capture fails: this one does not."""
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        torch.cuda.set_stream(before)


def replay_times(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """Milliseconds of each replay, after two to warm up."""
    for _ in range(2):
        graph.replay()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]
