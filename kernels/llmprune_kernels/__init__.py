"""Formats of sparse weights, and layers that run them. A leaf: it needs torch, and Triton where a GPU runs."""

from llmprune_kernels.bitmap import PackedBitmap, pack_bitmap, unpack_bitmap
from llmprune_kernels.format import FormatError, obeys, violation
from llmprune_kernels.linear import SparseLinear24, SparseLinearBitmap
from llmprune_kernels.op import nm_linear
from llmprune_kernels.pack24 import Packed24, pack24, unpack24
from llmprune_kernels.reference import linear24, linear_bitmap

__all__ = [
    "FormatError",
    "Packed24",
    "PackedBitmap",
    "SparseLinear24",
    "SparseLinearBitmap",
    "linear24",
    "linear_bitmap",
    "nm_linear",
    "obeys",
    "pack24",
    "pack_bitmap",
    "unpack24",
    "unpack_bitmap",
    "violation",
]
