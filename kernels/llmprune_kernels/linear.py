"""torch.nn.Linear with a weight that stays packed, one class for each form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune_kernels.bitmap import BITS, PackedBitmap, check_bitmap, pack_bitmap, unpack_bitmap
from llmprune_kernels.format import FormatError
from llmprune_kernels.pack24 import Packed24, check24, pack24, packed_shapes, unpack24
from llmprune_kernels.packed_linear import PackedLinear

if TYPE_CHECKING:
    from typing_extensions import Self


class SparseLinear24(PackedLinear):
    """A linear layer that holds a 2:4 weight packed (pack24)."""

    FORMAT = "2:4"
    CANONICAL = "values"
    NAMES = ("values", "positions")

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, stored: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> Self:
        values, positions = packed_shapes(out_features, in_features)
        if stored != values[0] * values[1]:
            raise FormatError(
                f"a 2:4 weight {out_features} x {in_features} stores {values[0] * values[1]}, not {stored}"
            )
        tensors = (
            torch.empty(values, dtype=dtype, device=device),
            torch.empty(positions, dtype=torch.uint8, device=device),
        )
        return cls(in_features, out_features, tensors, _empty_bias(out_features, bias, dtype, device))

    @staticmethod
    def _pack(weight: Tensor) -> Packed24:
        return pack24(weight)

    def to_dense(self) -> Tensor:
        """The weight [out, in]; exact."""
        return unpack24(self.packed)

    def check(self) -> None:
        """Shapes that fit, and positions that exist."""
        check24(self.packed)


class SparseLinearBitmap(PackedLinear):
    """A linear layer that holds a weight with any zeros as bitmap and values (bitmap)."""

    FORMAT = "bitmap"
    CANONICAL = "bitmap"
    NAMES = ("values", "bitmap")

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, stored: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> Self:
        if not 0 <= stored <= in_features * out_features:
            raise FormatError(f"a weight {out_features} x {in_features} cannot store {stored} values")
        bitmap = (out_features, -(-in_features // BITS))
        tensors = (
            torch.empty(stored, dtype=dtype, device=device),
            torch.empty(bitmap, dtype=torch.uint8, device=device),
        )
        return cls(in_features, out_features, tensors, _empty_bias(out_features, bias, dtype, device))

    @staticmethod
    def _pack(weight: Tensor) -> PackedBitmap:
        return pack_bitmap(weight)

    def to_dense(self) -> Tensor:
        """The weight [out, in]; exact."""
        return unpack_bitmap(self.packed)

    def check(self) -> None:
        """As many values as marks, all inside the matrix."""
        check_bitmap(self.packed)


def _empty_bias(out_features: int, bias: bool, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return torch.empty(out_features, dtype=dtype, device=device) if bias else None


MODULES: dict[str, type[PackedLinear]] = {kind.FORMAT: kind for kind in (SparseLinear24, SparseLinearBitmap)}
