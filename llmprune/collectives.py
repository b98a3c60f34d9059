"""What the ranks of one run exchange. On a single process every function is the identity.

Sums are formed from the gathered parts in rank order, so that all ranks hold the same bits: two ranks
that differ in the last digit of a statistic would cut different weights.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: Tensor) -> list[Tensor]:
    """The tensors of all ranks (all of one shape), in rank order."""
    ranks = world()[1]
    if ranks == 1:
        return [value]
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(ranks)]
    dist.all_gather(parts, value)
    return parts


def summed_(value: Tensor) -> None:
    """Add up in place over the ranks, then take rank 0's bits everywhere."""
    if world()[1] > 1:
        dist.all_reduce(value)
        dist.broadcast(value, src=0)


def gathered_objects(value: T) -> list[T]:
    """Small Python objects of all ranks, in rank order."""
    ranks = world()[1]
    if ranks == 1:
        return [value]
    parts: list[T | None] = [None] * ranks
    dist.all_gather_object(parts, value)
    return [part for part in parts if part is not None]


def from_rank_zero(value: Tensor) -> Tensor:
    """Rank 0's tensor on every rank; the others may hold any shape."""
    if world()[1] == 1:
        return value
    box: list[Tensor | None] = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]
