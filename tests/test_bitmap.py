"""The packed form of any zeros against a reader and a writer that go bit by bit in plain Python."""

from __future__ import annotations

import pytest
import torch
from llmprune_kernels import FormatError, PackedBitmap, pack_bitmap, unpack_bitmap
from packing import DTYPES, WIDTHS, bits, bits_without_signs_of_zeros, random_sparse
from torch import Tensor


def written(weight: Tensor) -> tuple[list[float], list[list[int]]]:
    """Stored values and bitmap bytes; a weight is whatever does not print as a zero."""
    values, bitmap = [], []
    for row in weight.tolist():
        octets = [0] * ((len(row) + 7) // 8)
        for column, value in enumerate(row):
            if str(value) not in ("0.0", "-0.0"):
                values.append(value)
                octets[column // 8] += 2 ** (column % 8)
        bitmap.append(octets)
    return values, bitmap


def read(packed: PackedBitmap) -> list[int]:
    """The matrix's bits, row by row, from the bits of the packed form."""
    values = iter(bits(packed.values))
    return [
        next(values) if row[column // 8] // 2 ** (column % 8) % 2 else 0
        for row in packed.bitmap.tolist()
        for column in range(packed.columns)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [*WIDTHS, 8, 9])
def test_packing_equals_a_loop_and_comes_back(columns: int, dtype: torch.dtype) -> None:
    weight = random_sparse(7, columns, dtype, seed=columns)
    packed = pack_bitmap(weight)
    values, bitmap = written(weight)
    assert bits(packed.values) == bits(torch.tensor(values, dtype=dtype))
    assert packed.bitmap.tolist() == bitmap and packed.bitmap.dtype == torch.uint8
    assert packed.shape == weight.shape and packed.values.dtype == dtype
    back = unpack_bitmap(packed)
    assert bits(back) == read(packed) == bits(weight)
    assert back.shape == weight.shape and back.dtype == dtype and back.is_contiguous()


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (0, 3), (3, 0), (0, 0)])
def test_empty_matrices(rows: int, columns: int) -> None:
    packed = pack_bitmap(torch.zeros(rows, columns))
    assert packed.shape == (rows, columns) and packed.values.numel() == 0
    assert unpack_bitmap(packed).shape == (rows, columns)


@pytest.mark.parametrize("columns", WIDTHS)
def test_nothing_and_everything_stored(columns: int) -> None:
    nothing = pack_bitmap(torch.zeros(3, columns))
    assert nothing.values.numel() == 0 and not nothing.bitmap.any() and not unpack_bitmap(nothing).any()
    full = pack_bitmap(torch.ones(3, columns))
    assert full.values.numel() == 3 * columns and unpack_bitmap(full).equal(torch.ones(3, columns))
    last = 2 ** (columns % 8) - 1 if columns % 8 else 255
    assert full.bitmap[:, -1].tolist() == [last] * 3  # no mark beyond the matrix


def test_all_256_bytes() -> None:
    weight = torch.tensor([[float(byte >> bit & 1) for bit in range(8)] for byte in range(256)])
    packed = pack_bitmap(weight)
    assert packed.bitmap.flatten().tolist() == list(range(256))
    assert unpack_bitmap(packed).equal(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zeros_are_zeros_and_nan_and_infinities_keep_their_bits(dtype: torch.dtype) -> None:
    numbers = [
        float("nan"),
        -0.0,
        float("inf"),
        0.0,
        -float("inf"),
        -0.0,
        torch.finfo(dtype).smallest_normal,
        -2.0,
        -0.0,
    ]
    weight = torch.tensor([numbers, [-0.0] * 9], dtype=dtype)
    integer = {torch.float32: torch.int32}.get(dtype, torch.int16)
    weight.view(integer)[1, 8] = torch.tensor(float("nan"), dtype=dtype).view(integer) + 5  # another NaN
    weight.view(integer)[1, 3] = 1  # the smallest subnormal number
    packed = pack_bitmap(weight)
    assert packed.values.numel() == 7
    assert bits(unpack_bitmap(packed)) == bits_without_signs_of_zeros(weight) != bits(weight)


def test_strided_and_transposed_matrices() -> None:
    weight = random_sparse(6, 20, torch.float16)
    for view in (weight.T.contiguous().T, weight.repeat_interleave(3, dim=1)[:, ::3]):
        assert not view.is_contiguous()
        packed = pack_bitmap(view)
        assert packed.bitmap.equal(pack_bitmap(weight).bitmap) and packed.bitmap.is_contiguous()
        assert bits(packed.values) == bits(pack_bitmap(weight).values)


def test_bytes() -> None:
    weight = torch.zeros(16, 136, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    assert pack_bitmap(weight).nbytes * 16 == 16 * 136 * 2 * 9  # half of the weights: 0.5625
    weight[:, 1::2] = 1
    assert pack_bitmap(weight).nbytes * 16 == 16 * 136 * 2 * 17
    weight[:, :] = 0
    assert pack_bitmap(weight).nbytes == 16 * 136 // 8


def test_a_packed_matrix_keeps_no_graph_alive() -> None:
    packed = pack_bitmap(torch.nn.Parameter(random_sparse(3, 8, torch.float32)))
    assert not packed.values.requires_grad


@pytest.mark.parametrize("weight", [torch.zeros(8), torch.zeros(2, 4, 4), torch.zeros(2, 8, dtype=torch.int32)])
def test_what_is_no_matrix_of_weights_cannot_be_packed(weight: Tensor) -> None:
    with pytest.raises(FormatError, match=r"cannot be packed: give \[out, in\]"):
        pack_bitmap(weight)


@pytest.mark.parametrize("bit", range(24))
def test_a_bit_that_flips_is_found(bit: int) -> None:
    weight = random_sparse(1, 21, torch.float32)
    packed = pack_bitmap(weight)
    packed.bitmap[0, bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(FormatError, match="beyond the last of its 21 columns" if bit >= 21 else "but .* are stored"):
        unpack_bitmap(packed)


@pytest.mark.parametrize(
    ("stored", "bitmap", "what"),
    [
        (3, torch.tensor([[3], [1]], dtype=torch.uint8), None),
        (2, torch.tensor([[3], [1]], dtype=torch.uint8), "marks 3 weights, but 2 are stored"),
        (4, torch.tensor([[3], [1]], dtype=torch.uint8), "marks 3 weights, but 4 are stored"),
        (3, torch.tensor([[3, 0], [1, 0]], dtype=torch.uint8), "does not fit a weight of 5 columns"),
        (0, torch.zeros((2, 0), dtype=torch.uint8), "does not fit a weight of 5 columns"),
        (3, torch.tensor([3, 1], dtype=torch.uint8), "does not fit a weight of 5 columns"),
        (3, torch.tensor([[3], [1]], dtype=torch.int8), r"bitmap torch\.int8"),
        ((3, 1), torch.tensor([[3], [1]], dtype=torch.uint8), "no list of the stored weights"),
        ((), torch.tensor([[1], [0]], dtype=torch.uint8), "no list of the stored weights"),
    ],
)
def test_tensors_that_do_not_fit(stored: int | tuple[int, ...], bitmap: Tensor, what: str | None) -> None:
    packed = PackedBitmap(torch.ones(stored), bitmap, 5)
    if what is None:
        assert unpack_bitmap(packed).tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
        return
    with pytest.raises(FormatError, match=what):
        unpack_bitmap(packed)


def test_values_of_another_dtype() -> None:
    packed = PackedBitmap(torch.ones(3, dtype=torch.int32), torch.tensor([[3], [1]], dtype=torch.uint8), 5)
    with pytest.raises(FormatError, match=r"values torch\.int32 .* are no list"):
        unpack_bitmap(packed)
