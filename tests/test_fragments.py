"""The order of the sparse tensor core, against the emulated instruction and back."""

from __future__ import annotations

import numpy as np
import ptx
import pytest
import torch
from llmprune_kernels import FormatError, pack24
from llmprune_kernels.fragments import ORDER, from_fragments, to_fragments
from packing import random24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (32, 512), (37, 331), (70, 516), (1, 1), (17, 257), (0, 8)])
def test_there_and_back_bit_by_bit(rows: int, columns: int, dtype: torch.dtype) -> None:
    packed = pack24(random24(rows, columns, dtype))
    fragments, metadata = to_fragments(packed)
    blocks, tiles = -(-columns // 256), -(-rows // 16)
    assert fragments.shape == (tiles, blocks, 8, 32, 8) and fragments.dtype == dtype and fragments.is_contiguous()
    assert metadata.shape == (tiles, blocks, 32, 4) and metadata.dtype == torch.int32 and metadata.is_contiguous()
    back = from_fragments([fragments, metadata], rows, columns)
    assert torch.equal(back.values.view(torch.int16), packed.values.view(torch.int16))
    assert torch.equal(back.positions, packed.positions) and back.columns == columns


def test_bytes_are_those_of_the_packed_form_where_nothing_is_padded() -> None:
    packed = pack24(random24(48, 1024, torch.bfloat16))
    assert sum(tensor.nbytes for tensor in to_fragments(packed)) == packed.nbytes == 48 * 1024 * 2 * 9 // 16


def test_32_bit_weights_are_refused() -> None:
    with pytest.raises(FormatError, match=r"16-bit weights, not torch\.float32: use layout 'portable'"):
        to_fragments(pack24(torch.eye(4)))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_the_instruction_finds_every_weight_in_its_place(dtype: str) -> None:
    """Each tile as mma.sp reads it, times the unit vectors in the order of the groups, is that part of the weight."""
    weight = random24(32, 512, {"bf16": torch.bfloat16, "f16": torch.float16}[dtype], seed=1)
    fragments, metadata = (tensor.numpy() for tensor in (t.view(torch.int32) for t in to_fragments(pack24(weight))))
    for row_tile, block, tile in np.ndindex(2, 2, 8):
        # Of a tile's 32 inputs, the 4 of the weight's group r stand where ORDER puts it.
        part = weight[16 * row_tile :][:16, 256 * block + 32 * tile :][:, :32].double().numpy()
        moved = np.concatenate([part[:, 4 * r : 4 * r + 4] for r in ORDER], axis=1)
        for first in range(0, 32, 8):
            x = np.zeros((32, 8))
            x[first + np.arange(8), np.arange(8)] = 1.0
            found = multiply(fragments[row_tile, block, tile], metadata[row_tile, block], tile, x, dtype)
            np.testing.assert_array_equal(found, moved[:, first : first + 8])


def multiply(a: np.ndarray, words: np.ndarray, tile: int, x: np.ndarray, dtype: str) -> np.ndarray:
    """One mma.sp, [16, 8], with x [32, 8] laid out by hand."""
    b = np.zeros((32, 4), dtype=np.uint32)
    one = {"bf16": 0x3F80, "f16": 0x3C00}[dtype]
    for row, column in np.argwhere(x == 1.0):
        lane, register, half = 4 * column + row % 8 // 2, row // 8, row % 2
        b[lane, register] |= np.uint32(one << (16 * half))
    assembly = (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{dtype}.{dtype}.f32 {{$0, $1, $2, $3}}, "
        f"{{$4, $5, $6, $7}}, {{$8, $9, $10, $11}}, {{$12, $13, $14, $15}}, $16, 0x{tile % 2};"
    )
    c = np.zeros((32, 4), dtype=np.float32)
    e = words[:, tile // 2 : tile // 2 + 1]
    d = ptx.run(assembly, ",".join(["=f"] * 4 + ["r"] * 13), [a, b, c, np.ascontiguousarray(e)])
    out = np.zeros((16, 8))
    for lane in range(32):
        for i in range(4):
            out[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = d[i].view(np.float32)[lane]
    return out
