"""Layout "decode": few tokens times a 2:4 weight on the sparse tensor core; the weight is read packed and stays packed.

Up to ROWS tokens one kernel does it all (triton_kernels.mma_sp). Beyond, each call expands the weight into a dense
scratch of its own and multiplies that: correct and lean, never faster than dense; layout "both" is for those who
also want long prompts fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune_kernels.fragments import BLOCK_COLUMNS, TILE_ROWS, TILES, from_fragments, to_fragments
from llmprune_kernels.launch import check_operands, filled_up
from llmprune_kernels.layout import Layout
from llmprune_kernels.pack24 import Packed24

ROWS = 64  # tokens up to which the weight stays packed
TOKEN_TILE = 8
PTX_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ALIGNED = 8  # inputs in 16 bytes


@dataclass(frozen=True)
class Variant:
    """How the work is cut.

    Attributes:
        warps: of one program; they share its rows and its inputs.
        row_warps: warps that read the same inputs, for other rows.
        row_tiles: tiles of 16 rows of the weight that one warp takes; they share the loads of x.
        wide: lanes load 16 bytes of x and exchange words, instead of four words that lie apart.
    """

    warps: int
    row_warps: int
    row_tiles: int
    wide: bool

    def __str__(self) -> str:
        words = "wide" if self.wide else "narrow"
        return f"{self.warps} warps, {self.row_warps} x {self.row_tiles} row tiles, {words}"


VARIANTS = (
    *(Variant(warps, row_warps, 1, wide=True) for warps in (8, 16) for row_warps in (1, 2, 4)),
    *(Variant(warps, 1, 1, wide=False) for warps in (4, 8)),
    Variant(4, 1, 1, wide=True),
    *(Variant(8, row_warps, 2, wide=True) for row_warps in (1, 2, 4)),
)
"""What is worth timing on a GPU."""

LARGE = 480  # tiles of rows: then programs of two to four of them still fill each of some 132 multiprocessors
CUTS = (
    (1, Variant(8, 1, 1, wide=False), Variant(8, 1, 1, wide=False)),
    (8, Variant(8, 1, 1, wide=True), Variant(8, 2, 1, wide=True)),
    (16, Variant(16, 2, 1, wide=True), Variant(16, 4, 1, wide=True)),
    (32, Variant(16, 2, 1, wide=True), Variant(16, 4, 1, wide=True)),
    (ROWS, Variant(8, 2, 2, wide=True), Variant(8, 2, 2, wide=True)),
)
"""Up to so many tokens, the cut for a weight of few rows and the one for a LARGE weight: from counting instructions and
bytes, see kernels/README.md; `kernels/bench.py --tune` times them."""


def default_variant(tokens: int, row_tiles: int) -> Variant:
    """The cut for up to ROWS tokens and a weight of so many tiles of 16 rows."""
    _, few, large = next(cut for cut in CUTS if tokens <= cut[0])
    return large if row_tiles >= LARGE else few


def token_tiles(tokens: int) -> int:
    """Tiles of eight tokens that one program takes: 1, 2 or 4."""
    return 1 if tokens <= TOKEN_TILE else 2 if tokens <= 2 * TOKEN_TILE else 4


def multiply(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """x [tokens, in] times W^T plus bias, in x's dtype.

    Raises:
        ValueError: x does not go with the weight, or is where the kernels cannot run.
    """
    from llmprune_kernels.triton_kernels.mma_sp import expand_kernel

    if x.shape[0] > ROWS:
        check_operands(expand_kernel, "decode", x, tensors[0])
        return F.linear(x, expand(tensors)[:out_features, : x.shape[1]], bias)
    return multiply_variant(x, tensors, bias, out_features, default_variant(x.shape[0], tensors[0].shape[0]))


def multiply_variant(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int, variant: Variant
) -> Tensor:
    """As `multiply`, cut as told; any number of tokens, but meant for up to ROWS.

    Returns:
        [tokens, out_features] in x's dtype.
    """
    out = x.new_empty(x.shape[0], out_features)
    launch(x, tensors, bias, out, variant)
    return out


def launch(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out: Tensor, variant: Variant) -> None:
    """Write x W^T + bias to `out` [tokens, out_features], which may be of another floating-point dtype than x.

    Raises:
        ValueError: x does not go with the weight, or is where the kernel cannot run.
    """
    from llmprune_kernels.triton_kernels.mma_sp import decode_kernel

    fragments, metadata = tensors
    check_operands(decode_kernel, "decode", x, fragments)
    x = _aligned(x)
    words = x.view(torch.int32)
    tokens, row_tiles, blocks = x.shape[0], fragments.shape[0], fragments.shape[1]
    if tokens == 0 or row_tiles == 0:
        return
    own_tiles = variant.row_tiles * variant.row_warps
    grid = (-(-tokens // (token_tiles(tokens) * TOKEN_TILE)), -(-row_tiles // own_tiles))
    decode_kernel[grid](
        fragments.view(torch.int32),
        metadata,
        words,
        out if bias is None else bias,
        out,
        tokens,
        out.shape[1],
        row_tiles,
        blocks,
        words.shape[1],
        words.stride(0),
        out.stride(0),
        0,
        **constants(variant, tokens, x.dtype, x.shape[1] == blocks * BLOCK_COLUMNS, bias is not None),
        num_warps=variant.warps,
        num_stages=1,
    )


def constants(variant: Variant, tokens: int, dtype: torch.dtype, whole: bool, bias: bool) -> dict[str, Any]:
    """What the kernel is compiled for; `whole`: x fills the last block of 256 inputs."""
    from llmprune_kernels.triton_kernels.mma_sp import assembly

    return {
        "WARPS": variant.warps,
        "ROW_WARPS": variant.row_warps,
        "ROW_TILES": variant.row_tiles,
        "TOKEN_TILES": token_tiles(tokens),
        "WIDE": variant.wide,
        "WHOLE": whole,
        "BIAS": bias,
        "ASSEMBLY": assembly(PTX_NAMES[dtype]),
    }


def expand(tensors: Sequence[Tensor]) -> Tensor:
    """The dense weight with its padding, [16 * row tiles, 256 * blocks]."""
    from llmprune_kernels.triton_kernels.mma_sp import expand_kernel

    fragments, metadata = tensors
    row_tiles, blocks = fragments.shape[:2]
    out = fragments.new_empty(row_tiles * TILE_ROWS, blocks * BLOCK_COLUMNS)
    if out.numel():
        expand_kernel[(row_tiles, blocks)](
            fragments.view(torch.int32), metadata, out.view(torch.int64), blocks, num_warps=TILES // 2
        )
    return out


def _aligned(x: Tensor) -> Tensor:
    """x with consecutive inputs, every row on 16 bytes, and a whole number of 16-byte pieces."""
    x = filled_up(x, columns=ALIGNED)
    if x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


DECODE = Layout(Packed24, to_fragments, from_fragments, multiply, "0.5625, rows up to 16 and inputs up to 256")
