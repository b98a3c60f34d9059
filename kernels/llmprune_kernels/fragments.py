"""2:4 weights in the order in which the lanes of a warp hand them to the sparse tensor core.

`mma.sp.m16n8k32` multiplies 16 rows of a 2:4 matrix with 32 inputs. Lane l = 4 g + t of the warp holds four registers
of it, two 16-bit values each (PTX ISA, "Matrix fragments for sparse mma.m16n8k32"):

    register 2h + u: the pair kept of group 4h + t, row g + 8u        h, u in {0, 1}

and of every four lanes two hold the positions: 16 bits per row and half, row g low and row g + 8 high. The selector
says which two, so lanes 0 and 1 of four serve the even tiles of 32 inputs and lanes 2 and 3 the odd ones, and every
bit that is loaded is used.

Which eight groups of four inputs a tile calls 0 ... 7 is free, if x agrees. Group r of the weight takes place
ORDER.index(r): then the words of x that one lane needs, over both lanes of a pair, are 32 consecutive bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune_kernels.format import FormatError
from llmprune_kernels.pack24 import CODES, KEPT, Packed24, codes24, positions24

TILE_ROWS = 16
TILE_GROUPS = 8  # 32 inputs
TILES = 8  # tiles in a block of 256 inputs, one step of a warp
BLOCK_COLUMNS = 4 * TILE_GROUPS * TILES
LANES = 32
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the weight's group at each place of a tile


def to_fragments(packed: Packed24) -> list[Tensor]:
    """The two tensors that the decode kernel reads, from a matrix [out, in] in 16 bits.

    Returns:
        fragments, the values' dtype, [ceil(out / 16), ceil(in / 256), 8 tiles, 32 lanes, 4 registers * 2 values] and
        metadata, int32 [ceil(out / 16), ceil(in / 256), 32 lanes, 4]: word c serves tiles 2c and 2c + 1.

    Raises:
        FormatError: the values are not 16 bits wide.
    """
    if packed.values.element_size() != 2:
        raise FormatError(f"the decode layout holds 16-bit weights, not {packed.values.dtype}: use layout 'portable'")
    rows, groups = packed.values.shape[0], packed.values.shape[1] // KEPT
    blocks, tiles = -(-groups // (TILE_GROUPS * TILES)), -(-rows // TILE_ROWS)
    short_rows, short_groups = tiles * TILE_ROWS - rows, blocks * TILE_GROUPS * TILES - groups
    pad = torch.nn.functional.pad
    pairs = pad(packed.values.unflatten(1, (groups, KEPT)), (0, 0, 0, short_groups, 0, short_rows))
    codes = pad(codes24(packed.positions, groups), (0, short_groups, 0, short_rows), value=CODES[0])
    order = list(ORDER)
    # [tile row, u, g, block, tile, h, t, (value)]
    values = pairs.view(tiles, 2, 8, blocks, TILES, TILE_GROUPS, KEPT)[..., order, :]
    values = values.unflatten(5, (2, 4)).permute(0, 3, 4, 2, 6, 5, 1, 7)  # [.., block, tile, g, t, h, u, value]
    places = codes.view(tiles, 2, 8, blocks, TILES, TILE_GROUPS)[..., order].unflatten(5, (2, 4)).int()
    halves = (places << torch.arange(0, 16, 4, device=codes.device, dtype=torch.int32)).sum(6, dtype=torch.int32)
    words = halves[:, 0] | halves[:, 1] << 16  # [tile row, g, block, tile, h]
    words = words.unflatten(3, (TILES // 2, 2)).permute(0, 2, 1, 4, 5, 3)  # [tile row, block, g, odd, h, c]
    return [
        values.reshape(tiles, blocks, TILES, LANES, 8).contiguous(),
        words.reshape(tiles, blocks, LANES, TILES // 2).contiguous(),
    ]


def from_fragments(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Packed24:
    """What to_fragments was given, exactly."""
    fragments, metadata = tensors
    tiles, blocks = metadata.shape[:2]
    groups = -(-in_features // 4)
    place = [ORDER.index(r) for r in range(TILE_GROUPS)]
    values = fragments.view(tiles, blocks, TILES, 8, 4, 2, 2, KEPT).permute(0, 6, 3, 1, 2, 5, 4, 7)
    values = values.flatten(5, 6)[..., place, :].reshape(tiles * TILE_ROWS, blocks * TILE_GROUPS * TILES, KEPT)
    words = metadata.view(tiles, blocks, 8, 2, 2, TILES // 2).permute(0, 2, 1, 5, 3, 4).flatten(3, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), dim=1)  # [tile row, u, g, block, tile, h]
    codes = (halves.unsqueeze(-1) >> torch.arange(0, 16, 4, device=words.device, dtype=torch.int32)) & 15
    codes = codes.flatten(5, 6)[..., place].reshape(values.shape[:2]).to(torch.uint8)
    positions = positions24(codes[:out_features, :groups])
    return Packed24(values[:out_features, :groups].flatten(1).contiguous(), positions, in_features)
