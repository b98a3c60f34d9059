"""Layout "portable": 2:4 weights for any GPU that Triton knows.

It reads 0.5625 of the 16-bit bytes and lays the weights out in registers, so it does all the multiplications of the
dense product: a gain where memory is the limit, and never on long prompts.

The values are the canonical ones, a pair in one word. A word of codes holds those of groups that are GROUPS apart:
word l of block b has in its bits 4s to 4s + 3 the code of group (8b + s) * GROUPS + l. One tile of codes so serves
eight tiles of values, thread by thread. Groups up to the next full block are filled with a code that is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune_kernels.launch import check_operands, filled_up, interpreted, triton_dtype
from llmprune_kernels.layout import Layout
from llmprune_kernels.pack24 import CODES, GROUP, KEPT, Packed24, codes24, positions24

GROUPS = 32  # groups in a tile: four products of that depth
PARTS = 8  # codes in a word
STAGES = 2  # of software pipelining
WIDTH = 16  # groups; rows of x whose length it divides are read in wide pieces
PROGRAMS = 256  # that a GPU should get to do at the least; few outputs are split along their inputs until it has them


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts a product.

    Attributes:
        outputs: of one program.
        rows: of x, of one program.
        warps: of one program.
        unroll: parts of a block that stand one after the other in the code: 8 keeps a whole block of weights under
            way while the block before it is multiplied, and takes the shared memory for that.
    """

    outputs: int
    rows: int
    warps: int
    unroll: int


def tiles(rows: int, dtype: torch.dtype) -> Tiles:
    """The tiles for x [rows, in].

    Chosen so that no value is spilled, shared memory stays below 99 KB, and 32 outputs keep the compiler on `mma`,
    which reads the unpacked weights from registers on every architecture.
    """
    if dtype == torch.float32:  # no tensor cores
        return Tiles(32, 16, 4, 1) if rows <= 16 else Tiles(64, 32, 8, 1)
    if rows <= 16:
        return Tiles(32, 16, 2, 8)
    return Tiles(32, 32, 2, 1) if rows <= 64 else Tiles(32, 64, 4, 1)


def prepare(packed: Packed24) -> list[Tensor]:
    """Canonical form -> [values, codes]: values [out, 2 * groups] as they are, codes int32 [out, blocks * GROUPS]."""
    groups = packed.values.shape[1] // KEPT
    codes = codes24(packed.positions, groups)
    codes = F.pad(codes, (0, -groups % (PARTS * GROUPS)), value=CODES[0])
    shifts = 4 * torch.arange(PARTS, device=codes.device)
    words = (codes.unflatten(1, (-1, PARTS, GROUPS)).long() << shifts.view(-1, 1)).sum(2)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return [packed.values.contiguous(), signed.to(torch.int32).flatten(1)]


def restore(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Packed24:
    """[values, codes] -> the canonical form."""
    values, words = tensors
    shifts = 4 * torch.arange(PARTS, device=words.device)
    codes = (words.unflatten(1, (-1, 1, GROUPS)) >> shifts.view(-1, 1)) & 15
    codes = codes.flatten(1)[:, : values.shape[1] // KEPT].to(torch.uint8)
    return Packed24(values, positions24(codes), in_features)


def multiply(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """x [rows, in] W^T + bias [rows, out] in x's dtype; sums are float32, in an order that only the sizes decide.

    Raises:
        ValueError: x does not fit the weight, or is where the kernel cannot run.
    """
    from llmprune_kernels.triton_kernels import portable as kernels

    values, codes = tensors
    rows, groups, blocks = x.shape[0], values.shape[1] // KEPT, codes.shape[1] // GROUPS
    check_operands(kernels.linear24, "portable", x, values)
    if -(-x.shape[1] // GROUP) != groups:
        raise ValueError(f"x has {x.shape[1]} columns, the weight has {groups} groups of {GROUP}")
    cut = tiles(rows, x.dtype)
    grid = (-(-out_features // cut.outputs), -(-rows // cut.rows))
    split = max(1, min(blocks, PROGRAMS // max(1, grid[0] * grid[1])))
    out = x.new_empty((split, rows, out_features), dtype=x.dtype if split == 1 else torch.float32)
    if out.numel():
        inputs = slots(x)
        with torch.cuda.device_of(x):
            kernels.linear24[(grid[0], grid[1], split)](
                inputs,
                values.view(torch.int64 if x.dtype == torch.float32 else torch.int32),
                codes,
                values if bias is None else bias,
                out,
                rows,
                out_features,
                groups,
                inputs.shape[2],
                blocks,
                DTYPE=triton_dtype(x.dtype),
                HAS_BIAS=bias is not None,
                UPCAST=interpreted(kernels.linear24) and x.dtype == torch.bfloat16,
                OUTPUTS=cut.outputs,
                ROWS=cut.rows,
                GROUPS=GROUPS,
                UNROLL=cut.unroll,
                num_warps=cut.warps,
                num_stages=STAGES,
            )
    return out[0] if split == 1 else out.sum(0).to(x.dtype)


def slots(x: Tensor) -> Tensor:
    """x [rows, in] as [4, rows, width]: input 4g + j at [j, :, g], zeros up to the width."""
    padded = filled_up(x, columns=GROUP * WIDTH)
    return padded.view(x.shape[0], padded.shape[1] // GROUP, GROUP).permute(2, 0, 1).contiguous()


PORTABLE = Layout(Packed24, prepare, restore, multiply, "0.5625")
