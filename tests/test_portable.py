"""Layout "portable": exact both ways, and its kernel against the dense product in float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, Case, errors
from llmprune_kernels import SparseLinear24, pack24
from llmprune_kernels.layouts import LAYOUTS
from llmprune_kernels.portable import GROUPS, tiles
from packing import random24

pytest.importorskip("triton")

PORTABLE = LAYOUTS["portable"]
SHAPES = ((1, 37, 331), (16, 70, 516), (17, 33, 63), (70, 20, 132), (3, 20, 1100), (0, 8, 64))
CASES = [
    Case("portable", dtype, *shape, bias=(i + j) % 2 == 0)
    for i, dtype in enumerate(DTYPES)
    for j, shape in enumerate(SHAPES)
]


@pytest.fixture(scope="module")
def found() -> dict[Case, float]:
    return errors(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_dense_product(found: dict[Case, float], case: Case) -> None:
    assert found[case] <= 1


def test_every_choice_of_tiles_and_a_split_is_among_the_cases() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert {tiles(case.rows, dtype) for case in CASES} == {tiles(rows, dtype) for rows in range(200)}
    assert any(case.inputs > 4 * 8 * GROUPS for case in CASES), "more than one block, so that inputs are split"


@pytest.mark.parametrize("shape", [(70, 516), (3, 63), (5, 1), (1, 1024), (2, 1028), (4, 0), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_restore_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = pack24(random24(*shape, dtype))
    back = PORTABLE.restore(PORTABLE.prepare(packed), *shape)
    assert torch.equal(back.values, packed.values) and torch.equal(back.positions, packed.positions)
    assert back.columns == packed.columns


def test_codes_stand_where_the_layout_says() -> None:
    dense = random24(3, 1100, torch.bfloat16)
    words = PORTABLE.prepare(pack24(dense))[1]
    assert words.shape == (3, 2 * GROUPS) and words.dtype == torch.int32
    values = PORTABLE.prepare(pack24(dense))[0]
    for group in (0, 1, 31, 32, 255, 256, 274):
        block, part, lane = group // 256, group % 256 // 32, group % 32
        code = words[2, block * GROUPS + lane].item() >> 4 * part & 15
        row = torch.zeros(4, dtype=dense.dtype)
        row[code & 3], row[code >> 2] = values[2, 2 * group], values[2, 2 * group + 1]
        assert torch.equal(row, dense[2, 4 * group : 4 * group + 4])


def test_it_takes_the_bytes_it_says() -> None:
    layer = SparseLinear24.from_dense(random24(8, 2048, torch.bfloat16))
    layer.use_layout("portable")
    assert layer.weight_bytes == float(PORTABLE.memory) * 8 * 2048 * 2


def test_what_cannot_be_run_is_refused_in_words() -> None:
    layer = SparseLinear24.from_dense(random24(8, 64, torch.bfloat16))
    layer.use_layout("portable")
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="runs on a GPU"):
        layer(x)
    with pytest.raises(ValueError, match=r"x is .* of torch\.float32: .* of torch\.bfloat16"):
        layer(x.float())
