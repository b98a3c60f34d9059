# mypy: ignore-errors
# ruff: noqa: RET505 (the compiler leaves out what stands under `else` of a constant, not what follows a `return`)
"""A few tokens times a weight of any zeros, on plain cores: the bitmap says where each stored value belongs.

Tensors are one-dimensional, one element per thread, or have the tokens before: so every tensor has one layout only, and
nothing goes through shared memory before the end. Values are fetched one step before they are used and held in
registers, as the compiler else puts each load next to its use and one line of memory at a time would be under way.
"""

import triton
import triton.language as tl

RECORD = tl.constexpr(37)  # words of a part of four rows: the marks of 32 lanes, four starts, four counts


@triton.jit
def _number(bits, DTYPE: tl.constexpr):
    """The low bits of integers as a float32."""
    if tl.float32 == DTYPE:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _record(records, part, parts, lane):
    """A lane's marks, and four starts and the packed counts that all lanes share; zeros beyond the last part."""
    inside = part < parts
    at = records + part * RECORD
    marks = tl.load(at + lane, mask=inside, other=0)
    at += 32
    start0, start1 = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    start2, start3 = tl.load(at + 2, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    return marks, start0, start1, start2, start3, tl.load(at + 4, mask=inside, other=0)


@triton.jit
def _before(counts, WARPS: tl.constexpr):
    """Sums over the lanes of the warp before this one; four sums of a byte each at once."""
    up_to = tl.cumsum(tl.reshape(counts, (WARPS, 32)), 1)
    return tl.reshape(up_to, (WARPS * 32,)) - counts


@triton.jit
def _four(values, start, before, byte: tl.constexpr):
    """Four consecutive values, of which a lane with n marks needs the first n."""
    at = values + (start + ((before >> (8 * byte)) & 0xFF))
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _fetch(values, record, WARPS: tl.constexpr):
    """The values for the eight groups of four marks that a lane has: two halves of each of four rows."""
    marks, start0, start1, start2, start3, first_half = record
    counts = marks - ((marks >> 1) & 0x55555555)
    counts = (counts & 0x33333333) + ((counts >> 2) & 0x33333333)  # one in each four bits
    low = _before(counts & 0x0F0F0F0F, WARPS)
    high = _before((counts >> 4) & 0x0F0F0F0F, WARPS) + first_half  # at most 124 + 128: no carry
    return (
        (_four(values, start0, low, 0), _four(values, start0, high, 0)),
        (_four(values, start1, low, 1), _four(values, start1, high, 1)),
        (_four(values, start2, low, 2), _four(values, start2, high, 2)),
        (_four(values, start3, low, 3), _four(values, start3, high, 3)),
    )


@triton.jit
def _inputs(x, at, inside, DTYPE: tl.constexpr):
    """Inputs 4 at to 4 at + 3 in float32; 16-bit ones are read as one int64."""
    if tl.float32 == DTYPE:
        x0, x1 = tl.load(x + 4 * at, mask=inside, other=0.0), tl.load(x + 4 * at + 1, mask=inside, other=0.0)
        x2, x3 = tl.load(x + 4 * at + 2, mask=inside, other=0.0), tl.load(x + 4 * at + 3, mask=inside, other=0.0)
        return x0, x1, x2, x3
    else:
        # Eight bytes of a thread, and no more: two words would make a layout that marks and values do not have.
        four = tl.load(tl.multiple_of(x + at, (8, 8)), mask=inside, other=0)
        return (
            _number(four, DTYPE),
            _number(four >> 16, DTYPE),
            _number(four >> 32, DTYPE),
            _number(four >> 48, DTYPE),
        )


@triton.jit
def _add(total, four, marks, x, DTYPE: tl.constexpr):
    """total [tokens, threads] plus the products of four inputs with the weights at the lowest four marks.

    The value of input j is the one numbered by the marks below j: three steps of selects spread the values out.
    """
    v0, v1, v2, v3 = four
    x0, x1, x2, x3 = x
    has0, has1, has2, has3 = (marks & 1) != 0, (marks & 2) != 0, (marks & 4) != 0, (marks & 8) != 0
    w1, v2, v3 = tl.where(has0, v1, v0), tl.where(has0, v2, v1), tl.where(has0, v3, v2)
    w2, v3 = tl.where(has1, v2, w1), tl.where(has1, v3, v2)
    w3 = tl.where(has2, v3, w2)
    total = tl.where(has0[None, :], total + _number(v0, DTYPE)[None, :] * x0, total)
    total = tl.where(has1[None, :], total + _number(w1, DTYPE)[None, :] * x1, total)
    total = tl.where(has2[None, :], total + _number(w2, DTYPE)[None, :] * x2, total)
    return tl.where(has3[None, :], total + _number(w3, DTYPE)[None, :] * x3, total)


@triton.jit
def linear_bitmap(
    x,  # 16 bits: int64 [rows, width], four inputs in one word; float32: [rows, 4 * width]
    values,  # integers as wide as a weight, [stored + 4]
    records,  # int32 [quads, parts, RECORD], see llmprune_kernels.bitmap_kernel
    bias,  # [outputs]; not read without HAS_BIAS
    out,  # [rows, outputs]
    rows,
    outputs,
    parts,
    width,
    DTYPE: tl.constexpr,  # of weights and x
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,  # rows up to a power of two
    WARPS: tl.constexpr,
):
    """out[:, 4q : 4q + 4] for q = program: the warps take parts of 256 inputs in turn and add up in a fixed order."""
    quad = tl.program_id(0)
    thread = tl.arange(0, WARPS * 32)
    warp, lane = thread // 32, thread % 32
    token = tl.arange(0, TOKENS)[:, None]
    token_x = x + token.to(tl.int64) * (width * (4 if tl.float32 == DTYPE else 1))
    own = records + quad.to(tl.int64) * parts * RECORD
    record = _record(own, warp, parts, lane)
    marks = record[0]
    fetched = _fetch(values, record, WARPS)
    record = _record(own, warp + WARPS, parts, lane)
    total0 = tl.zeros((TOKENS, WARPS * 32), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for first in range(0, parts, WARPS):
        at = ((first + warp) * 64 + lane)[None, :]
        low = _inputs(token_x, at, (at < width) & (token < rows), DTYPE)
        high = _inputs(token_x, at + 32, (at + 32 < width) & (token < rows), DTYPE)
        row0, row1, row2, row3 = fetched
        total0 = _add(_add(total0, row0[0], marks, low, DTYPE), row0[1], marks >> 4, high, DTYPE)
        total1 = _add(_add(total1, row1[0], marks >> 8, low, DTYPE), row1[1], marks >> 12, high, DTYPE)
        total2 = _add(_add(total2, row2[0], marks >> 16, low, DTYPE), row2[1], marks >> 20, high, DTYPE)
        total3 = _add(_add(total3, row3[0], marks >> 24, low, DTYPE), row3[1], marks >> 28, high, DTYPE)
        marks = record[0]
        fetched = _fetch(values, record, WARPS)
        record = _record(own, first + 2 * WARPS + warp, parts, lane)
    totals = tl.join(tl.join(total0, total2), tl.join(total1, total3))  # the last two axes number the rows in order
    sums = tl.sum(tl.reshape(totals, (TOKENS, WARPS * 32, 4)), 1)
    row = quad * 4 + tl.arange(0, 4)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    inside = (row < outputs) & (token < rows)
    tl.store(out + token.to(tl.int64) * outputs + row, sums.to(out.dtype.element_ty), mask=inside)
