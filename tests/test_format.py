"""The n:m check against a loop over every row and group."""

from __future__ import annotations

import pytest
import torch
from llmprune_kernels import obeys, violation
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def literal_violation(weight: Tensor, n: int, m: int) -> tuple[int, int] | None:
    """Row by row, group by group; a weight is whatever does not print as a zero."""
    for i, row in enumerate(weight.tolist()):
        for a in range(0, len(row), m):
            if sum(str(value) not in ("0.0", "-0.0") for value in row[a : a + m]) > n:
                return i, a
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 3), (2, 63), (34, 68)])
def test_violations_equal_a_loop(n: int, m: int, dtype: torch.dtype) -> None:
    found = set()
    for density in (0.02, 0.1, 0.3, 0.9):
        for groups in (1, 3, 17):
            weight = torch.randn(5, groups * m, dtype=dtype) * (torch.rand(5, groups * m) < density)
            weight[weight == 0] = 0.0
            expected = literal_violation(weight, n, m)
            assert violation(weight, n, m) == expected
            assert obeys(weight, n, m) is (expected is None)
            found.add(expected is None)
    assert found == {True, False}  # both outcomes were met


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_a_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 3, 4, 0, 0]], dtype=dtype)
    assert violation(weight, 2, 4) is None
    weight[1, 7] = -0.0
    assert violation(weight, 2, 4) is None and obeys(weight, 2, 4)
    weight[1, 7] = torch.finfo(dtype).smallest_normal
    assert violation(weight, 2, 4) == literal_violation(weight, 2, 4) == (1, 4)
    assert not obeys(weight, 2, 4)


def test_nan_and_infinity_are_weights() -> None:
    weight = torch.tensor([[float("nan"), float("inf"), 1.0, 0.0]])
    assert violation(weight, 2, 4) == (0, 0)
    assert violation(weight, 3, 4) is None


def test_the_first_of_several_is_named() -> None:
    weight = torch.zeros(4, 12)
    weight[2, 8:] = 1.0
    weight[2, 4:8] = 1.0
    weight[3, :4] = 1.0
    assert violation(weight, 2, 4) == (2, 4)


@pytest.mark.parametrize("width", [63, 66, 1])
def test_odd_widths(width: int) -> None:
    weight = torch.zeros(3, width)
    assert not obeys(weight, 2, 4)
    with pytest.raises(ValueError, match="groups of 4"):
        violation(weight, 2, 4)


def test_all_zero_and_empty_matrices_obey() -> None:
    for weight in (torch.zeros(3, 68), torch.zeros(0, 68), torch.zeros(3, 0)):
        assert obeys(weight, 1, 4) and violation(weight, 1, 4) is None


def test_a_transposed_view_is_read_along_its_inputs() -> None:
    stored = torch.zeros(8, 3)  # [in, out], as a Conv1D keeps it
    stored[:3, 1] = 1.0
    assert violation(stored.T, 2, 4) == (1, 0)
    assert obeys(stored.T, 3, 4)
