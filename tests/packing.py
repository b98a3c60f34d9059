"""What the tests of packed weights share: matrices with every kind of group, and equality bit by bit."""

from __future__ import annotations

import random

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 3, 4, 63, 68, 132, 331)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> list[int]:
    """The elements' bits as integers, row by row: tells NaN from NaN and -0.0 from 0.0."""
    numbers: list[int] = tensor.contiguous().view(INTEGERS[tensor.element_size()]).flatten().tolist()
    return numbers


def bits_without_signs_of_zeros(tensor: Tensor) -> list[int]:
    """As `bits`, with every -0.0 as 0.0."""
    zeroed = tensor.clone()
    zeroed[zeroed == 0] = 0.0
    return bits(zeroed)


def random24(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A 2:4 matrix whose groups hold 0, 1 or 2 weights."""
    chance = random.Random(seed)
    weight = torch.zeros(rows, columns)
    for row in range(rows):
        for start in range(0, columns, 4):
            slots = list(range(start, min(start + 4, columns)))
            for column in chance.sample(slots, min(chance.choice((0, 1, 2, 2, 2)), len(slots))):
                weight[row, column] = chance.choice((-1, 1)) * chance.uniform(0.1, 2)
    return weight.to(dtype)


def random_sparse(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A matrix of which about half is zero."""
    chance = random.Random(seed)
    numbers = [[chance.uniform(-2, 2) if chance.random() < 0.5 else 0.0 for _ in range(columns)] for _ in range(rows)]
    return torch.tensor(numbers, dtype=dtype).view(rows, columns)
