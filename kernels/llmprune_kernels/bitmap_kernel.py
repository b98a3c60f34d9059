"""Layout "bitmap-rows": weights with any zeros for up to eight tokens at a time, on a GPU.

The values stay as they are, row by row. Records hold what says where they belong, for four rows q and a part p of 256
inputs, in 37 words of 32 bits:

    0-31   marks: byte r of word l is row 4q + r; its low four bits are inputs 256p + 4l and the three after it, its
           high four bits the same 128 inputs on
    32-35  where the values of the part start, for each row
    36     byte r: how many values row 4q + r has in the first 128 inputs

A warp so reads a record at once, lane l its word l, and finds its values with two prefix sums for all four rows.

Counted in machine code for sm_90 (Triton 3.6.0 / 3.9.0), instructions per weight: 9.3 / 9.8 for one token, 11.6 / 12.1
for two, 15.3 / 15.5 for four, 22.1 / 22.8 for eight. An H100 that streams 3 TB/s has 11 to spend, so the instructions
allow one token what the bytes allow, 1.75 times the speed of the dense weight, and eight tokens less than dense. More
than eight are multiplied with a dense copy made for the call: no gain but the memory that stays free between calls.

A weight that is not stored multiplies nothing: an input that is no number reaches only outputs that hold a weight for
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune_kernels.bitmap import BITS, PackedBitmap, marked, spread
from llmprune_kernels.format import FormatError
from llmprune_kernels.launch import check_operands, filled_up, triton_dtype
from llmprune_kernels.layout import Layout

ROWS = 4  # of the weight, in one record
PART = 256  # inputs
LANES = 32
WORD = 4  # marks of a lane in half a part; inputs of a lane that are read at once
TOKENS = 8  # up to which the kernel runs
MOST_VALUES = 2**31 - 512  # a lane looks up to a part further


def warps(quads: int) -> int:
    """Warps of one program, which share its inputs: more where there are too few outputs to fill a GPU."""
    return 8 if quads < 512 else 4


def prepare(packed: PackedBitmap) -> list[Tensor]:
    """Canonical form -> [values, records]: values [stored + 4], records int32 [quads, parts, 37].

    Raises:
        FormatError: 2^31 values or more.
    """
    if packed.values.numel() > MOST_VALUES:
        raise FormatError(f"{packed.values.numel()} values: layout 'bitmap-rows' numbers up to {MOST_VALUES}")
    rows, columns = packed.shape
    quads, parts = -(-rows // ROWS), -(-columns // PART)
    padding = (0, parts * PART // BITS - packed.bitmap.shape[1], 0, quads * ROWS - rows)
    bitmap = F.pad(packed.bitmap, padding).view(quads, ROWS, parts, PART // BITS)
    halves = torch.stack((bitmap & 15, bitmap >> 4), -1).view(quads, ROWS, parts, 2, LANES)
    marks = _words((halves[:, :, :, 0] | halves[:, :, :, 1] << 4).permute(0, 2, 3, 1))

    ones = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=bitmap.device)
    counts = ones[bitmap.int()].view(quads, ROWS, parts, 2, LANES // 2).sum(4)
    totals = counts.sum(3)
    starts = (totals.flatten().cumsum(0).view_as(totals) - totals).permute(0, 2, 1)
    first_half = _words(counts[..., 0].to(torch.uint8).permute(0, 2, 1))
    records = torch.cat((marks, starts.to(torch.int32), first_half.unsqueeze(2)), 2)
    return [F.pad(packed.values, (0, WORD)), records]


def restore(tensors: Sequence[Tensor], out_features: int, in_features: int) -> PackedBitmap:
    """[values, records] -> the canonical form."""
    values, records = tensors
    quads, parts = records.shape[:2]
    marks = records[..., :LANES].reshape(-1).view(torch.uint8).view(quads, parts, LANES, ROWS).permute(0, 3, 1, 2)
    halves = torch.stack((marks & 15, marks >> 4), 3).reshape(quads * ROWS, parts * PART // BITS, 2)
    bitmap = halves[..., 0] | halves[..., 1] << 4
    return PackedBitmap(values[:-WORD], bitmap[:out_features, : -(-in_features // BITS)].contiguous(), in_features)


def multiply(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """x [rows, in] W^T + bias [rows, out] in x's dtype; sums are float32, in an order that only the sizes decide.

    Raises:
        ValueError: x does not fit the weight, or is where the kernel cannot run.
    """
    from llmprune_kernels.triton_kernels.bitmap import linear_bitmap

    values, records = tensors
    check_operands(linear_bitmap, "bitmap-rows", x, values)
    quads, parts = records.shape[:2]
    if -(-x.shape[1] // PART) != parts:
        raise ValueError(f"x has {x.shape[1]} columns, the weight {parts} parts of {PART}")
    rows = x.shape[0]
    if rows > TOKENS:
        return F.linear(x, dense(tensors, out_features, x.shape[1]), bias)
    out = x.new_empty(rows, out_features)
    if out.numel():
        inputs = pieces(x)
        single = x.dtype == torch.float32
        with torch.cuda.device_of(x):
            linear_bitmap[(quads,)](
                inputs,
                values.view(torch.int32 if single else torch.int16),
                records,
                values if bias is None else bias,
                out,
                rows,
                out_features,
                parts,
                inputs.shape[1] // (WORD if single else 1),
                DTYPE=triton_dtype(x.dtype),
                HAS_BIAS=bias is not None,
                TOKENS=1 << (rows - 1).bit_length(),
                WARPS=warps(quads),
                num_warps=warps(quads),
                num_stages=1,
            )
    return out


def dense(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Tensor:
    """The weight [out, in]; unlike `unpack_bitmap` it checks nothing, so the GPU need not be waited for."""
    packed = restore(tensors, out_features, in_features)
    return spread(packed, marked(packed.bitmap))


def pieces(x: Tensor) -> Tensor:
    """x [rows, in] as the kernel reads it: full groups of four inputs, one in an int64 where an input has 16 bits."""
    x = filled_up(x, columns=WORD).contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x if x.dtype == torch.float32 else x.view(torch.int64)


def _words(four: Tensor) -> Tensor:
    """uint8 [..., 4] as int32 [...]: the first byte is the lowest."""
    return four.reshape(-1).view(torch.int32).view(four.shape[:-1])


BITMAP_ROWS = Layout(PackedBitmap, prepare, restore, multiply, "0.0723 + density")
