"""torch.nn.Linear with a weight that stays packed, one class for each form."""

from __future__ import annotations

import math

from torch import Tensor

from llmprune_kernels.bitmap import BITS, PackedBitmap, check_bitmap, pack_bitmap, unpack_bitmap
from llmprune_kernels.format import FormatError
from llmprune_kernels.pack24 import Packed24, check24, pack24, packed_shapes, unpack24
from llmprune_kernels.packed_linear import PackedLinear


class SparseLinear24(PackedLinear):
    """A linear layer that holds a 2:4 weight packed (pack24)."""

    FORMAT = "2:4"
    CANONICAL = "values"
    NAMES = ("values", "positions")

    @classmethod
    def count_stored(cls, in_features: int, out_features: int, nonzero: int) -> int:
        """Two of every group of four, whatever they are."""
        return math.prod(packed_shapes(out_features, in_features)[0])

    @classmethod
    def shapes(cls, in_features: int, out_features: int, stored: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of values and positions."""
        wanted = cls.count_stored(in_features, out_features, 0)
        if stored != wanted:
            raise FormatError(f"a 2:4 weight {out_features} x {in_features} stores {wanted}, not {stored}")
        return packed_shapes(out_features, in_features)

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
    def count_stored(cls, in_features: int, out_features: int, nonzero: int) -> int:
        """All that are not zero."""
        return nonzero

    @classmethod
    def shapes(cls, in_features: int, out_features: int, stored: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of values and bitmap."""
        if not 0 <= stored <= in_features * out_features:
            raise FormatError(f"a weight {out_features} x {in_features} cannot store {stored} values")
        return (stored,), (out_features, -(-in_features // BITS))

    @staticmethod
    def _pack(weight: Tensor) -> PackedBitmap:
        return pack_bitmap(weight)

    def to_dense(self) -> Tensor:
        """The weight [out, in]; exact."""
        return unpack_bitmap(self.packed)

    def check(self) -> None:
        """As many values as marks, all inside the matrix."""
        check_bitmap(self.packed)


MODULES: dict[str, type[PackedLinear]] = {kind.FORMAT: kind for kind in (SparseLinear24, SparseLinearBitmap)}
