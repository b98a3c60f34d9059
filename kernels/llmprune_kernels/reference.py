"""The definition: unpack, then torch's own linear. Every kernel is tested against it; a CPU runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune_kernels.bitmap import PackedBitmap, unpack_bitmap
from llmprune_kernels.layout import Layout
from llmprune_kernels.pack24 import Packed24, unpack24


def linear24(x: Tensor, packed: Packed24, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the unpacked [out, in], transposed, plus bias [out]."""
    return _linear(x, unpack24(packed), bias)


def linear_bitmap(x: Tensor, packed: PackedBitmap, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the unpacked [out, in], transposed, plus bias [out]."""
    return _linear(x, unpack_bitmap(packed), bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Autocast would give another dtype than the operator promises to torch.compile."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def _tensors24(packed: Packed24) -> list[Tensor]:
    return [packed.values, packed.positions]


def _packed24(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Packed24:
    return Packed24(tensors[0], tensors[1], in_features)


def _multiply24(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    return linear24(x, _packed24(tensors, out_features, x.shape[1]), bias)


def _tensors_bitmap(packed: PackedBitmap) -> list[Tensor]:
    return [packed.values, packed.bitmap]


def _packed_bitmap(tensors: Sequence[Tensor], out_features: int, in_features: int) -> PackedBitmap:
    return PackedBitmap(tensors[0], tensors[1], in_features)


def _multiply_bitmap(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    return linear_bitmap(x, _packed_bitmap(tensors, out_features, x.shape[1]), bias)


VALUES = Layout(Packed24, _tensors24, _packed24, _multiply24, "0.5625")
BITMAP = Layout(PackedBitmap, _tensors_bitmap, _packed_bitmap, _multiply_bitmap, "0.0625 + density")
