# mypy: ignore-errors
"""The decode kernel: compressed weights straight to the sparse tensor core, from stock Triton.

A tensor [..., 32 * WARPS, 4] whose row is the thread and whose columns are that thread's registers is what
`inline_asm_elementwise(pack=4)` hands to the assembly, one thread's four at a time. Four is the operand size of
`mma.sp.m16n8k32`, for the weights, for x and for the sums. Triton does not promise this map; llmprune_kernels.selftest
tries it out on the device before anything relies on it.
"""

import functools

import triton
import triton.language as tl

TILES = tl.constexpr(8)


@functools.cache
def assembly(dtype: str) -> str:
    """Eight chained mma.sp: one block of 256 inputs for 16 rows and 8 tokens, for "bf16" or "f16".

    One block of assembly, as the compiler would otherwise move each load next to the product that needs it, and one
    load at a time would be under way. Operands: $0-3 sums out, $4-35 weights, $36-67 x, $68-71 sums in, $72-75
    positions.
    """
    lines = []
    for tile in range(TILES.value):
        a = ", ".join(f"${4 + 4 * tile + i}" for i in range(4))
        b = ", ".join(f"${36 + 4 * tile + i}" for i in range(4))
        sums = "$68, $69, $70, $71" if tile == 0 else "$0, $1, $2, $3"
        lines.append(
            f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 "
            f"{{$0, $1, $2, $3}}, {{{a}}}, {{{b}}}, {{{sums}}}, ${72 + tile // 2}, 0x{tile % 2};"
        )
    return "\n".join(lines)


# The two lanes of a pair hold 16 consecutive bytes each. The even one needs the first word of each of the four groups
# of four inputs that they hold together, the odd one the second.
EXCHANGE = tl.constexpr(
    """{
.reg .pred even;
.reg .b32 lane, give0, give1, take0, take1;
mov.u32 lane, %laneid;
and.b32 lane, lane, 1;
setp.eq.u32 even, lane, 0;
selp.b32 give0, $5, $4, even;
selp.b32 give1, $7, $6, even;
shfl.sync.bfly.b32 take0, give0, 1, 31, 0xffffffff;
shfl.sync.bfly.b32 take1, give1, 1, 31, 0xffffffff;
selp.b32 $0, $4, take0, even;
selp.b32 $1, $6, take1, even;
selp.b32 $2, take0, $5, even;
selp.b32 $3, take1, $7, even;
}"""
)
EXCHANGE_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 4))
CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 64 + ["f"] * 4 + ["r"] * 4))
NO_POSITIONS = tl.constexpr(0x44444444)  # 0 is no position: its two slots would be the same


@triton.jit
def weights_of(fragments, metadata, first, row_tiles, block, blocks, ROW_TILES: tl.constexpr, THREADS: tl.constexpr):
    """For each row tile: the weights of eight tiles of one block, and their positions."""
    lane = tl.arange(0, THREADS)[:, None] % 32
    own = lane * 4 + tl.arange(0, 4)[None, :]
    found = ()
    for r in tl.static_range(ROW_TILES):
        here = (block < blocks) & (first + r < row_tiles)
        at = (first + r).to(tl.int64) * blocks + block
        w = fragments + at * 1024 + own
        tiles = ()
        for tile in tl.static_range(TILES):
            tiles = tiles + (tl.load(w + tile * 128, mask=here, other=0, eviction_policy="evict_first"),)
        found = found + ((tiles, tl.load(metadata + at * 128 + own, mask=here, other=NO_POSITIONS)),)
    return found


@triton.jit
def inputs_of(x, token, tokens, x_stride, block, blocks, words, WIDE: tl.constexpr, WHOLE: tl.constexpr):
    """x for eight tiles of one block, of each lane's token."""
    part = tl.arange(0, token.shape[0])[:, None] % 4
    # Where a lane's words begin within a tile; consecutive if the lanes exchange words, else every other one.
    word = block * 128 + (4 * part if WIDE else 8 * (part // 2) + part % 2)
    own = word + (1 if WIDE else 2) * tl.arange(0, 4)[None, :]
    last = word if WIDE else own  # of four consecutive words all are in x or none
    there = (block < blocks) & (token < tokens)
    v = x + token.to(tl.int64) * x_stride + own
    tiles = ()
    for tile in tl.static_range(TILES):
        mask = there if WHOLE else there & (last + tile * 16 < words)
        tiles = tiles + (tl.load(v + tile * 16, mask=mask, other=0),)
    return tiles


@triton.jit
def bits_of(tiles):
    """The bits that are set in any of eight tensors: it takes all eight to know."""
    return ((tiles[0] | tiles[1]) | (tiles[2] | tiles[3])) | ((tiles[4] | tiles[5]) | (tiles[6] | tiles[7]))


@triton.jit
def exchanged(tiles, gate):
    """Eight tiles of x as the product takes them, from lanes that hold 16 consecutive bytes each."""
    found = ()
    for tile in tl.static_range(TILES):
        four = tiles[tile] | gate if tile == 0 else tiles[tile]
        four = tl.inline_asm_elementwise(EXCHANGE, EXCHANGE_CONSTRAINTS, [four], dtype=tl.int32, is_pure=True, pack=4)
        found = found + (four,)
    return found


@triton.jit(do_not_specialize=["tokens", "zero"])
def decode_kernel(
    fragments,
    metadata,
    x,
    bias,
    out,
    tokens,
    out_features,
    row_tiles,
    blocks,
    words,
    x_stride,
    out_stride,
    zero,
    WARPS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """out [tokens, out_features] = x W^T + bias for 16 * ROW_TILES * ROW_WARPS rows of W and 8 * TOKEN_TILES tokens.

    ROW_WARPS warps read the same inputs for other rows, and find them in the L1. The others take turns with the blocks
    of 256 inputs and add up their sums at the end: no barrier in the loop, no atomics, always in the same order.

    Args:
        fragments: int32 [row_tiles, blocks, 8, 32, 4].
        metadata: int32 [row_tiles, blocks, 32, 4].
        x: int32 [tokens, words], two 16-bit inputs each; x_stride in words, a multiple of 4.
        bias: [out_features], read if BIAS.
        zero: 0, which the compiler must not know.
        WIDE: lanes load 16 bytes of x and exchange words.
        WHOLE: x has 256 inputs for every block.
    """
    THREADS: tl.constexpr = 32 * WARPS
    TURNS: tl.constexpr = WARPS // ROW_WARPS
    # Programs with the same weights follow each other, so that all but the first find them in the L2.
    first_token = tl.program_id(0) * (8 * TOKEN_TILES)
    base = tl.program_id(1) * (ROW_TILES * ROW_WARPS)
    thread = tl.arange(0, THREADS)[:, None]
    first = base + thread // 32 % ROW_WARPS * ROW_TILES
    turn = thread // 32 // ROW_WARPS
    token = first_token + thread % 32 // 4
    sums = ()
    for _ in tl.static_range(ROW_TILES * TOKEN_TILES):
        sums = sums + (tl.zeros((THREADS, 4), tl.float32),)
    for start in range(0, blocks, TURNS):
        block = start + turn
        weights = weights_of(fragments, metadata, first, row_tiles, block, blocks, ROW_TILES, THREADS)
        # Left alone, the compiler moves each load next to its product, and one at a time is under way. So the first
        # word of x that is exchanged is made to depend on all that is loaded.
        bits = bits_of(weights[0][0])
        for r in tl.static_range(1, ROW_TILES):
            bits = bits | bits_of(weights[r][0])
        added = ()
        for t in tl.static_range(TOKEN_TILES):
            b = inputs_of(x, token + 8 * t, tokens, x_stride, block, blocks, words, WIDE, WHOLE)
            if WIDE:
                bits = bits | bits_of(b)
                b = exchanged(b, bits & zero)
            for r in tl.static_range(ROW_TILES):
                a = weights[r][0]
                total = tl.inline_asm_elementwise(
                    ASSEMBLY,
                    CONSTRAINTS,
                    [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]
                    + [b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]
                    + [sums[t * ROW_TILES + r], weights[r][1]],
                    dtype=tl.float32,
                    is_pure=True,
                    pack=4,
                )
                added = added + (total,)
        sums = added
    # Register 2u + v of lane 4g + t holds row g + 8u, token 2t + v.
    place = tl.arange(0, 128)[None, :]
    row_warp = tl.arange(0, ROW_WARPS)[:, None]
    for r in tl.static_range(ROW_TILES):
        row = (base + row_warp * ROW_TILES + r) * 16 + place // 16 + 8 * (place % 4 // 2)
        if BIAS:
            offset = tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)
        for t in tl.static_range(TOKEN_TILES):
            total = tl.sum(tl.reshape(sums[t * ROW_TILES + r], (TURNS, ROW_WARPS, 128)), 0)
            if BIAS:
                total += offset
            column = first_token + 8 * t + place // 4 % 4 * 2 + place % 2
            at = out + column.to(tl.int64) * out_stride + row
            tl.store(at, total.to(out.dtype.element_ty), mask=(row < out_features) & (column < tokens))


@triton.jit
def expand_kernel(fragments, metadata, out, blocks):
    """The dense weight, from the fragments of one row tile and one block of 256 inputs.

    Args:
        fragments: int32 [row_tiles, blocks, 8, 32, 4].
        metadata: int32 [row_tiles, blocks, 32, 4].
        out: int64 [16 * row_tiles, 64 * blocks], four 16-bit weights each.
    """
    row_tile = tl.program_id(0)
    block = tl.program_id(1)
    tile = tl.arange(0, 8)[:, None, None]
    lane = tl.arange(0, 32)[None, :, None]
    register = tl.arange(0, 4)[None, None, :]
    u = register % 2
    h = register // 2
    part = lane % 4
    at = (row_tile.to(tl.int64) * blocks + block) * 1024 + tile * 128 + lane * 4 + register
    pair = tl.load(fragments + at)
    holder = (lane // 4) * 4 + (tile % 2) * 2 + h
    word = tl.load(metadata + (row_tile.to(tl.int64) * blocks + block) * 128 + holder * 4 + tile // 2)
    code = word >> (16 * u + 4 * part)
    low = (pair & 0xFFFF).to(tl.int64) << (16 * (code & 3)).to(tl.int64)
    high = ((pair >> 16) & 0xFFFF).to(tl.int64) << (16 * ((code >> 2) & 3)).to(tl.int64)
    place = 4 * h + part  # of the group in its tile; even places hold groups 0 to 3, odd ones 4 to 7
    group = block * 64 + tile * 8 + place // 2 + 4 * (place % 2)
    row = row_tile.to(tl.int64) * 16 + lane // 4 + 8 * u
    tl.store(out + row * (blocks * 64) + group, low | high)
