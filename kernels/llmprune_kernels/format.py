"""Does a weight matrix fit an n:m format, and if not, where is it broken?

-0.0 is a zero here and in every packed form: one that counted it in one place and not in another would be read
with the wrong weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FormatError(ValueError):
    """A matrix that does not fit the format, or packed tensors that are damaged."""


def check_matrix(weight: Tensor) -> None:
    """`weight` is a matrix [out, in] that can be packed.

    Raises:
        FormatError: it is not.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        given = f"{list(weight.shape)} of {weight.dtype}"
        raise FormatError(f"a weight {given} cannot be packed: give [out, in] of 16, 32 or 64 bit floats")
    if weight.is_meta:
        raise FormatError(f"a weight {list(weight.shape)} on the meta device holds no numbers: load it before packing")


def violation(weight: Tensor, n: int, m: int) -> tuple[int, int] | None:
    """The first (row, column) at which a group of m consecutive inputs holds more than n weights.

    Args:
        weight: [out, in].
        n: weights that a group may hold, 0 < n < m.
        m: group size.

    Returns:
        The row and the column where the first bad group starts, or None if the matrix obeys n:m.

    Raises:
        ValueError: m does not divide the number of inputs.
    """
    if weight.shape[1] % m:
        raise ValueError(f"{weight.shape[1]} inputs cannot be cut into groups of {m}")
    too_many = (weight != 0).unflatten(1, (weight.shape[1] // m, m)).sum(-1) > n
    if not bool(too_many.any()):
        return None
    row, group = (int(i) for i in too_many.nonzero()[0])
    return row, group * m


def obeys(weight: Tensor, n: int, m: int) -> bool:
    """True if every group of m consecutive inputs of `weight` [out, in] holds at most n weights."""
    return weight.shape[1] % m == 0 and violation(weight, n, m) is None
