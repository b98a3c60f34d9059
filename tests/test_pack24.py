"""The packed 2:4 form against a reader and a writer that go group by group in plain Python."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from llmprune_kernels import FormatError, Packed24, pack24, unpack24
from packing import DTYPES, WIDTHS, bits, bits_without_signs_of_zeros, random24
from torch import Tensor

CODES = [0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110]  # slots (0,1) (0,2) (1,2) (0,3) (1,3) (2,3)
SLOTS = {(): (0, 1), (0,): (0, 1), (1,): (0, 1), (2,): (0, 2), (3,): (0, 3)}
"""Where the two values of a group with fewer than two weights come from."""


def written(weight: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Values and position bytes, group by group; a weight is whatever does not print as a zero."""
    values, positions = [], []
    for row in weight.tolist():
        row = row + [0.0] * (-len(row) % 4)
        kept, codes = [], []
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            filled = tuple(i for i, value in enumerate(group) if str(value) not in ("0.0", "-0.0"))
            marked = tuple(i for i, value in enumerate(group) if str(value) != "0.0")
            filled = marked if len(marked) <= 2 else filled
            first, second = filled if len(filled) == 2 else SLOTS[filled]
            kept += [group[first], group[second]]
            codes.append(first + 4 * second)
        codes += [0b0100] * (len(codes) % 2)
        values.append(kept)
        positions.append([low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)])
    return values, positions


def read(packed: Packed24) -> list[int]:
    """The matrix's bits, row by row, from the bits of the packed form."""
    rows, columns = packed.shape
    values = iter(bits(packed.values))
    matrix: list[int] = []
    for row in packed.positions.tolist():
        line = [0] * (8 * len(row) + 8)
        for group in range((columns + 3) // 4):
            code = row[group // 2] // 16 ** (group % 2) % 16
            line[4 * group + code % 4] = next(values)
            line[4 * group + code // 4] = next(values)
        matrix += line[:columns]
    assert len(matrix) == rows * columns
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_packing_equals_a_loop_and_comes_back(columns: int, dtype: torch.dtype) -> None:
    weight = random24(7, columns, dtype, seed=columns)
    packed = pack24(weight)
    values, positions = written(weight)
    assert bits(packed.values) == bits(torch.tensor(values, dtype=dtype))
    assert packed.positions.tolist() == positions
    assert packed.shape == weight.shape and packed.values.dtype == dtype
    back = unpack24(packed)
    assert bits(back) == read(packed) == bits(weight)
    assert back.shape == weight.shape and back.dtype == dtype and back.is_contiguous()


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (0, 3), (3, 0), (0, 0)])
def test_empty_matrices(rows: int, columns: int) -> None:
    packed = pack24(torch.zeros(rows, columns))
    assert packed.shape == (rows, columns)
    assert unpack24(packed).shape == (rows, columns)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_matrix_of_zeros(columns: int) -> None:
    packed = pack24(torch.zeros(3, columns))
    assert not packed.values.any() and set(packed.positions.flatten().tolist()) == {0x44}
    assert bits(unpack24(packed)) == [0] * 3 * columns


def test_every_group_with_up_to_two_weights() -> None:
    groups = [
        [1.0 + i if i in kept else 0.0 for i in range(4)]
        for size in (0, 1, 2)
        for kept in itertools.combinations(range(4), size)
    ]
    weight = torch.tensor(groups)
    packed = pack24(weight)
    assert [code & 15 for code in packed.positions.flatten().tolist()] == [
        # nothing; slot 0, 1, 2, 3; slots 01, 02, 03, 12, 13, 23
        *(0b0100, 0b0100, 0b0100, 0b1000, 0b1100, 0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
    ]
    assert unpack24(packed).tolist() == groups


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group_of_zeros_of_both_signs_and_weights(dtype: torch.dtype) -> None:
    groups = [group for group in itertools.product((0.0, -0.0, 3.0), repeat=4) if group.count(3.0) <= 2]
    assert len(groups) == 16 + 4 * 8 + 6 * 4  # with no, one, two weights
    weight = torch.tensor(groups, dtype=dtype)
    back = unpack24(pack24(weight))
    for before, after in zip(weight, back, strict=True):
        lost = sum(str(value) != "0.0" for value in before.tolist()) > 2  # no room for all negative zeros
        if lost:
            assert bits(after) == bits_without_signs_of_zeros(before)
        else:
            assert bits(after) == bits(before)


def test_a_negative_zero_is_no_weight() -> None:
    packed = pack24(torch.tensor([[-0.0, 1.0, -0.0, 2.0], [-0.0, -0.0, -0.0, -0.0]]))
    assert packed.values.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert unpack24(packed).tolist() == [[0.0, 1.0, 0.0, 2.0], [0.0] * 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_keep_their_bits(dtype: torch.dtype) -> None:
    integer = {torch.float32: torch.int32}.get(dtype, torch.int16)
    quiet = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype).view(integer)
    payload = quiet[0] + 5  # another NaN
    smallest = torch.ones(1, dtype=integer)  # the smallest subnormal number
    numbers = torch.cat((quiet, payload.view(1), smallest)).view(dtype)
    weight = torch.zeros(4, 10, dtype=dtype)
    weight[0, :2], weight[1, 6:8], weight[2, 9], weight[3, 4] = numbers[:2], numbers[2:4], numbers[3], numbers[4]
    assert bits(unpack24(pack24(weight))) == bits(weight)
    assert torch.isnan(weight[1, 7]) and torch.isnan(weight[2, 9]) and weight[3, 4] != 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_transposed_matrices(dtype: torch.dtype) -> None:
    weight = random24(6, 20, dtype)
    views = [weight.T.contiguous().T, weight.repeat_interleave(3, dim=1)[:, ::3], weight.repeat(2, 1)[6:]]
    assert not views[0].is_contiguous() and not views[1].is_contiguous()
    expected = pack24(weight)
    for view in views:
        packed = pack24(view)
        assert bits(packed.values) == bits(expected.values)
        assert packed.positions.equal(expected.positions)
        assert packed.values.is_contiguous() and packed.positions.is_contiguous()


def test_the_same_matrix_is_packed_to_the_same_bytes() -> None:
    weight = random24(9, 132, torch.float16)
    weight[weight == 0] = torch.where(torch.rand(int((weight == 0).sum())) < 0.2, -0.0, 0.0).half()
    first = pack24(weight)
    for again in (pack24(weight), pack24(weight.clone())):
        assert bits(again.values) == bits(first.values) and again.positions.equal(first.positions)
    zeroed = weight.clone()
    zeroed[zeroed == 0] = 0.0
    twice = pack24(unpack24(pack24(zeroed)))
    assert bits(twice.values) == bits(pack24(zeroed).values) and twice.positions.equal(pack24(zeroed).positions)


@pytest.mark.parametrize("at_once", [1, 70, 200, 1000])
def test_row_slices_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random24(7, 67, torch.bfloat16)
    whole = pack24(weight)
    monkeypatch.setattr(importlib.import_module("llmprune_kernels.pack24"), "ROWS_AT_ONCE", at_once)
    sliced = pack24(weight)
    assert bits(sliced.values) == bits(whole.values) and sliced.positions.equal(whole.positions)
    assert bits(unpack24(sliced)) == bits(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 64), (16, 136)])
def test_bytes_are_nine_sixteenths(rows: int, columns: int, dtype: torch.dtype) -> None:
    packed = pack24(random24(rows, columns, dtype))
    assert packed.nbytes * 16 == rows * columns * 2 * 9
    assert packed.nbytes == rows * (columns // 2 * 2 + columns // 8)


def test_a_packed_matrix_keeps_no_graph_alive() -> None:
    weight = torch.nn.Parameter(random24(3, 8, torch.float32))
    packed = pack24(weight)
    assert not packed.values.requires_grad
    assert not unpack24(packed).requires_grad


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ([(4, 5), (2, 9)], "row 2, column 8"),  # a lower row, though its group lies further right
        ([(3, 40), (3, 13), (4, 0)], "row 3, column 12"),
        ([(0, 0)], "row 0, column 0"),
        ([(5, 66), (5, 64)], "row 5, column 64"),  # the last group, short of one column
    ],
)
def test_the_first_group_that_breaks_the_format_is_named(bad: list[tuple[int, int]], named: str) -> None:
    weight = random24(6, 67, torch.float32)
    for row, column in bad:
        start = column // 4 * 4
        weight[row, start : start + 4] = torch.tensor([1.0, 2.0, 3.0, 0.0])[: 67 - start]
    with pytest.raises(
        FormatError, match=rf"not 2:4 at {named}: \[1\.0, 2\.0, 3\.0.*\] holds 3 weights, 2 are allowed"
    ):
        pack24(weight)


@pytest.mark.parametrize("weight", [torch.zeros(8), torch.zeros(2, 4, 4), torch.tensor(1.0)])
def test_what_is_no_matrix_cannot_be_packed(weight: Tensor) -> None:
    with pytest.raises(FormatError, match=r"cannot be packed: give \[out, in\]"):
        pack24(weight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_what_are_no_weights_cannot_be_packed(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match=f"{dtype} cannot be packed"):
        pack24(torch.zeros(2, 8).to(dtype))


def test_every_damaged_position_byte_is_found() -> None:
    good = {low + 16 * high for low in CODES for high in CODES}
    assert len(good) == 36
    for byte in range(256):
        packed = pack24(torch.zeros(3, 24))
        packed.positions[1, 2] = byte
        if byte in good:
            assert not unpack24(packed).any()
        else:
            with pytest.raises(FormatError, match=f"position byte {byte:#04x} at row 1, byte 2 is damaged"):
                unpack24(packed)


@pytest.mark.parametrize(
    ("values", "positions", "columns"),
    [
        ((3, 12), (3, 3), 20),  # as many bytes, but values for 24 columns
        ((3, 10), (3, 2), 20),
        ((3, 10), (2, 3), 20),
        ((2, 10), (3, 3), 20),
        ((3, 10, 1), (3, 3), 20),
        ((30,), (3, 3), 20),
        ((3, 10), (9,), 20),
        ((3, 10), (3, 3), 24),
        ((3, 10), (3, 3), 16),
    ],
)
def test_tensors_that_do_not_fit(values: tuple[int, ...], positions: tuple[int, ...], columns: int) -> None:
    packed = Packed24(torch.zeros(values), torch.full(positions, 0x44, dtype=torch.uint8), columns)
    with pytest.raises(FormatError, match="do not fit"):
        unpack24(packed)


@pytest.mark.parametrize(("values", "positions"), [(torch.float32, torch.int8), (torch.int16, torch.uint8)])
def test_tensors_of_another_dtype(values: torch.dtype, positions: torch.dtype) -> None:
    packed = Packed24(torch.zeros(3, 8, dtype=values), torch.full((3, 2), 0x44, dtype=positions), 16)
    with pytest.raises(FormatError, match=f"values are {values} and positions {positions}: they must be"):
        unpack24(packed)
