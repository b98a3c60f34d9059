"""Layout "bitmap-rows": exact both ways, and its kernel against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, Case, errors
from llmprune_kernels import SparseLinearBitmap, pack_bitmap
from llmprune_kernels.bitmap_kernel import TOKENS, dense, warps
from llmprune_kernels.layouts import LAYOUTS
from packing import random_sparse

pytest.importorskip("triton")

ROWS = LAYOUTS["bitmap-rows"]
SHAPES = ((1, 13, 331), (3, 6, 516), (8, 5, 63), (16, 33, 132), (2, 1, 1), (0, 8, 64))
CASES = [
    Case("bitmap-rows", dtype, *shape, bias=(i + j) % 2 == 0)
    for i, dtype in enumerate(DTYPES)
    for j, shape in enumerate(SHAPES)
]
CASES += [Case("bitmap-rows", "bfloat16", 1, 70, 516, bias=True), Case("bitmap-rows", "float16", 1, 5, 2400, bias=True)]


@pytest.fixture(scope="module")
def found() -> dict[Case, float]:
    return errors(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_dense_product(found: dict[Case, float], case: Case) -> None:
    assert found[case] <= 1


def test_the_cases_reach_every_loop() -> None:
    assert {case.rows > TOKENS for case in CASES} == {False, True}
    assert any(case.inputs > 256 * warps(-(-case.outputs // 4)) for case in CASES), "a second step of the warps"


@pytest.mark.parametrize("shape", [(70, 516), (3, 63), (5, 1), (4, 256), (9, 257), (4, 0), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("full", [False, True])
def test_restore_is_exact(shape: tuple[int, int], dtype: torch.dtype, full: bool) -> None:
    weight = torch.randn(*shape).to(dtype) if full else random_sparse(*shape, dtype)
    packed = pack_bitmap(weight)
    tensors = ROWS.prepare(packed)
    back = ROWS.restore(tensors, *shape)
    assert torch.equal(back.values, packed.values) and torch.equal(back.bitmap, packed.bitmap)
    assert back.columns == packed.columns
    assert torch.equal(dense(tensors, *shape), weight)


def test_records_say_where_values_are() -> None:
    weight = random_sparse(6, 700, torch.float32)
    values, records = ROWS.prepare(pack_bitmap(weight))
    assert records.shape == (2, 3, 37) and records.dtype == torch.int32
    for row, column in ((0, 0), (1, 255), (3, 256), (5, 300), (5, 699), (2, 130)):
        record, byte = records[row // 4, column // 256], 8 * (row % 4)
        at = column % 256
        bit = byte + 4 * (at // 128) + at % 4
        assert (record[at % 128 // 4].item() >> bit & 1) == (weight[row, column] != 0)
        in_front = int((weight[row, column - at : column] != 0).sum())
        if weight[row, column] != 0:
            assert values[int(record[32 + row % 4]) + in_front] == weight[row, column]
        first_half = weight[row, column - at : min(700, column - at + 128)]
        assert (record[36].item() >> byte & 255) == int((first_half != 0).sum())


def test_it_takes_the_bytes_it_says() -> None:
    weight = random_sparse(64, 4096, torch.bfloat16)
    layer = SparseLinearBitmap.from_dense(weight)
    layer.use_layout("bitmap-rows")
    share = layer.weight_bytes / (weight.numel() * 2) - float((weight != 0).float().mean())
    assert ROWS.memory.startswith(f"{share:.4f}")


def test_what_cannot_be_run_is_refused_in_words() -> None:
    layer = SparseLinearBitmap.from_dense(random_sparse(8, 64, torch.bfloat16))
    layer.use_layout("bitmap-rows")
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="runs on a GPU"):
        layer(x)
    with pytest.raises(ValueError, match=r"x is .* of torch\.float32: .* of torch\.bfloat16"):
        layer(x.float())
