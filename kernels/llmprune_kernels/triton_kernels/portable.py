# mypy: ignore-errors
"""2:4 weights times x on any GPU that Triton knows, and in its interpreter."""

import triton
import triton.language as tl


@triton.jit
def _half(words, DTYPE: tl.constexpr):
    """The low 16 bits of each integer as a number."""
    return words.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _single(words):
    """The low 32 bits of each integer as a number."""
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def linear24(
    x,  # [4, rows, width]: the inputs of all groups, first those in their first slots
    values,  # integers twice as wide as a weight, [outputs, groups]: the two weights of a group in one word
    codes,  # int32 [outputs, blocks * GROUPS], see llmprune_kernels.portable
    bias,  # [outputs]; not read without HAS_BIAS
    out,  # [splits, rows, outputs]
    rows,
    outputs,
    groups,
    width,
    blocks,
    DTYPE: tl.constexpr,  # of weights and x
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter's dot multiplies the bits of bfloat16 as if they were integers
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out[split]^T = sum over the four slots j of W_j X_j^T, with W_j [OUTPUTS, GROUPS] the weights in slot j.

    A 16-bit group is laid out in one 64-bit word by two shifts, q = first << 16 i0 | second << 16 i1; slot j is then
    q >> 16 j. W is the left operand: the compiler takes the packed tile to the layout of a dot's operand, and what is
    unpacked goes from registers to the tensor cores.
    """
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    lanes = tl.arange(0, GROUPS)
    inside_n = (n < outputs)[:, None]
    inside_m = (m < rows)[None, :]
    code_rows = codes + n[:, None].to(tl.int64) * (blocks * GROUPS)
    value_rows = values + n[:, None].to(tl.int64) * groups
    x_rows = x + m[None, :].to(tl.int64) * width
    plane = tl.cast(rows, tl.int64) * width
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    per_split = tl.cdiv(blocks, tl.num_programs(2))
    for block in range(split * per_split, min((split + 1) * per_split, blocks)):
        code = tl.load(code_rows + (block * GROUPS + lanes)[None, :], mask=inside_n, other=0)
        for part in tl.range(8, loop_unroll_factor=UNROLL):
            g = (block * 8 + part) * GROUPS + lanes
            pair = tl.load(value_rows + g[None, :], mask=inside_n & (g < groups)[None, :], other=0)
            i0 = (code >> (4 * part)) & 3
            i1 = (code >> (4 * part + 2)) & 3
            if tl.float32 == DTYPE:
                first, second = _single(pair), _single(pair >> 32)
            else:
                first, second = (pair & 0xFFFF).to(tl.int64), ((pair >> 16) & 0xFFFF).to(tl.int64)
                group = (first << (i0 * 16).to(tl.int64)) | (second << (i1 * 16).to(tl.int64))
            for j in tl.static_range(4):
                if tl.float32 == DTYPE:
                    w = tl.where(i0 == j, first, tl.where(i1 == j, second, 0.0))
                else:
                    w = _half(group >> (16 * j), DTYPE)
                z = tl.load(x_rows + j * plane + g[:, None], mask=inside_m & (g < width)[:, None], other=0.0)
                if UPCAST:
                    w, z = w.to(tl.float32), z.to(tl.float32)
                total = tl.dot(w, z, total, input_precision="ieee")
    if HAS_BIAS:
        added = tl.load(bias + n[:, None], mask=inside_n, other=0.0).to(tl.float32)
        total += tl.where(split == 0, added, 0.0)
    at = out + (split * rows + m[None, :]).to(tl.int64) * outputs + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside_n & inside_m)
