"""What a layout of packed weights is: made from the canonical form, back to it, and a product with x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from llmprune_kernels.bitmap import PackedBitmap
from llmprune_kernels.pack24 import Packed24

P = TypeVar("P", Packed24, PackedBitmap)


@dataclass(frozen=True)
class Layout(Generic[P]):
    """One way to keep a packed matrix [out, in] in memory.

    Attributes:
        form: the canonical form it is made from.
        prepare: canonical form -> the layout's tensors, on the same device.
        restore: (tensors, out, in) -> the canonical form; exact.
        multiply: (x [rows, in], tensors, bias [out] or None, out) -> x W^T + bias [rows, out] in x's dtype.
        memory: bytes over those of the dense weight in 16 bits, in words.
    """

    form: type[P]
    prepare: Callable[[P], list[Tensor]]
    restore: Callable[[Sequence[Tensor], int, int], P]
    multiply: Callable[[Tensor, Sequence[Tensor], Tensor | None, int], Tensor]
    memory: str
