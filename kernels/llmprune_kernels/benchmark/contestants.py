"""The kernels that compete: torch's own, a dense one in Triton, and the layouts of this package."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune_kernels import bitmap_kernel, decode, prefill
from llmprune_kernels.bitmap import PackedBitmap, pack_bitmap
from llmprune_kernels.launch import filled_up
from llmprune_kernels.layouts import LAYOUTS
from llmprune_kernels.pack24 import pack24

MANY = 1 << 30
FEW = (1, decode.ROWS)


@dataclass(frozen=True)
class Contestant:
    """One way to multiply by a weight.

    Attributes:
        name: as in the table.
        form: what it reads, a name in roof.SHARE.
        make: dense weight [out, in] with zeros -> the tensors that `multiply` reads.
        multiply: (x [rows, in], tensors, out) -> x W^T [rows, out].
        rows: least and most rows it is meant for.
    """

    name: str
    form: str
    make: Callable[[Tensor], Sequence[Tensor]]
    multiply: Callable[[Tensor, Sequence[Tensor], int], Tensor]
    rows: tuple[int, int] = (1, MANY)

    def takes(self, rows: int) -> bool:
        """Whether it is meant for so many rows."""
        return self.rows[0] <= rows <= self.rows[1]


def layout(name: str, rows: tuple[int, int] = (1, MANY), label: str | None = None) -> Contestant:
    """A layout of this package, by its name in LAYOUTS."""
    chosen = LAYOUTS[name]
    form, pack = ("bitmap", pack_bitmap) if chosen.form is PackedBitmap else ("2:4", pack24)

    def make(weight: Tensor) -> Sequence[Tensor]:
        return chosen.prepare(pack(weight))

    def multiply(x: Tensor, tensors: Sequence[Tensor], out: int) -> Tensor:
        return chosen.multiply(x, tensors, None, out)

    return Contestant(label or name, form, make, multiply, rows)


def variants() -> list[Contestant]:
    """The decode kernel in every variant it offers, for tuning."""

    def multiply(variant: decode.Variant, x: Tensor, tensors: Sequence[Tensor], out: int) -> Tensor:
        return decode.multiply_variant(x, tensors, None, out, variant)

    like = layout("decode", FEW)
    return [
        dataclasses.replace(like, name=f"mma.sp {variant}", multiply=functools.partial(multiply, variant))
        for variant in decode.VARIANTS
    ]


def _cusparselt(x: Tensor, tensors: Sequence[Tensor], out: int) -> Tensor:
    return prefill.product(x, tensors[0], None, prefill.DEFAULT)


def _to_cutlass(weight: Tensor) -> Sequence[Tensor]:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    return [values, metadata]


def _cutlass(x: Tensor, tensors: Sequence[Tensor], out: int) -> Tensor:
    """The calls that F.linear makes on torch.sparse's tensor of this back end."""
    padded = filled_up(x, rows=prefill.ROWS)
    y: Tensor = torch._sparse_semi_structured_mm(tensors[0], tensors[1], padded.t())
    return y[:, : x.shape[0]].t().contiguous()


def _dense_gemv(x: Tensor, tensors: Sequence[Tensor], out: int) -> Tensor:
    from llmprune_kernels.triton_kernels.baselines import dense_gemv

    y = x.new_empty(1, out)
    block_out, block_in = 4, 1024
    dense_gemv[(-(-out // block_out),)](
        x, tensors[0], y, out, x.shape[1], BLOCK_OUT=block_out, BLOCK_IN=block_in, num_warps=4
    )
    return y


CUBLAS = Contestant("cuBLAS", "dense", lambda weight: [weight], lambda x, tensors, out: F.linear(x, tensors[0]))
TRITON_GEMV = Contestant("Triton GEMV, dense", "dense", lambda weight: [weight], _dense_gemv, (1, 1))
CUSPARSELT = Contestant(
    "cuSPARSELt, default algorithm", "2:4", lambda weight: [torch._cslt_compress(weight)], _cusparselt
)
CUTLASS = Contestant("CUTLASS through torch", "2:4", _to_cutlass, _cutlass)


def of_24() -> list[Contestant]:
    """All for 2:4 weights; the first is what the others are compared with."""
    best = layout("prefill", label="cuSPARSELt, searched algorithm (prefill)")
    ours = [layout("decode"), layout("portable", FEW), layout("both")]
    return [CUBLAS, TRITON_GEMV, CUSPARSELT, best, CUTLASS, *ours]


def of_bitmap() -> list[Contestant]:
    """All for weights with any zeros; the first is what the others are compared with."""
    return [CUBLAS, TRITON_GEMV, layout("bitmap-rows", (1, bitmap_kernel.TOKENS))]
