"""Times of many calls in one CUDA graph, each on another copy of its weight, so that no copy is still in the cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmprune_kernels.graphs import capturing, replay_times

Call = Callable[[], Tensor]
ROTATED = 300_000_000  # bytes of copies at least
L2_TIMES = 3  # and so many times the L2 cache
GRAPH_BYTES = 3_000_000_000  # weights read in one graph of products with few rows: about a millisecond on an H100
MOST_CALLS = 400  # in one graph


class Run(Protocol):
    """Calls that are run together."""

    def answers(self) -> list[Tensor]:
        """What the calls return; where that is possible their outputs hold NaN before."""

    def microseconds(self, repeats: int) -> list[float]:
        """Time per call, one for each repetition of all calls."""


Recorder = Callable[[Sequence[Call]], Run]


class Graph:
    """Calls captured in one CUDA graph on the current device, after one eager run that compiles and tunes them."""

    def __init__(self, calls: Sequence[Call]):
        for call in calls:
            call()
        torch.cuda.synchronize()
        self._calls = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self._graph):
            self._outputs = [call() for call in calls]

    def answers(self) -> list[Tensor]:
        for output in self._outputs:
            output.fill_(math.nan)
        self._graph.replay()
        torch.cuda.synchronize()
        return self._outputs

    def microseconds(self, repeats: int) -> list[float]:
        return [1e3 * one / self._calls for one in replay_times(self._graph, repeats)]


class Eager:
    """Calls made one after the other, on a CPU."""

    def __init__(self, calls: Sequence[Call]):
        self._calls = calls

    def answers(self) -> list[Tensor]:
        return [call() for call in self._calls]

    def microseconds(self, repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.answers()
            times.append(1e6 * (time.perf_counter() - start) / len(self._calls))
        return times


def copies(nbytes: float, l2: int, free: int) -> int:
    """How many copies of so many bytes are rotated: more than three times the L2 cache, and at least ROTATED.

    Args:
        l2: bytes of the cache.
        free: bytes of memory that may be used; never fewer than two copies.
    """
    wanted = max(ROTATED, L2_TIMES * l2 + 1)
    return max(2, min(math.ceil(wanted / nbytes), int(free // nbytes)))


def rounds(nbytes: float, count: int, graph_bytes: int = GRAPH_BYTES) -> int:
    """How often one graph of products with few rows goes around `count` copies: so often that its own launch is small
    beside them."""
    return max(1, math.ceil(min(graph_bytes / (nbytes * count), MOST_CALLS / count)))


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a copy inside a CUDA device's memory."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = Graph([lambda: target.copy_(source)]).microseconds(20)
    return 2e6 * nbytes / sorted(times)[len(times) // 2]


def launch_cost(device: torch.device, launches: int = 1000) -> float:
    """Microseconds that an empty kernel takes in a CUDA graph of such kernels."""
    from llmprune_kernels.triton_kernels.baselines import empty

    marker = torch.zeros(1, device=device)

    def launch() -> Tensor:
        empty[(1,)](marker)
        return marker

    times = Graph([launch] * launches).microseconds(20)
    return sorted(times)[len(times) // 2]
