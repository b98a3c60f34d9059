"""Masks against a sort of Python tuples: exact counts, ties by index, and how users write patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import count, f64, keep_matrix, keep_nm, keep_rows
from torch import Tensor

from llmprune.errors import InputError
from llmprune.patterns import NM, Unstructured, keep_largest, parse_pattern, pruned_count

SPARSITIES = ("0.01", "0.29", "0.5", "0.57", "0.7", "0.999")
SHAPES = ((1, 1), (1, 100), (3, 63), (7, 68), (5, 132), (2, 260))
NMS = ((1, 4), (2, 4), (3, 4), (4, 8), (1, 2), (1, 3), (63, 68))


def score_kinds(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Scores without ties, with many, and with nothing else."""
    return {
        "distinct": torch.randn(shape).abs(),
        "many ties": torch.randint(0, 3, shape).float(),
        "zeros of both signs": torch.randint(0, 2, shape).float() * -0.0,
        "all zero": torch.zeros(shape),
        "all equal": torch.full(shape, 0.3),
        "infinite": torch.where(torch.rand(shape) < 0.5, torch.inf, torch.rand(shape)),
    }


def assert_same(keep: Tensor, expected: np.ndarray, what: str) -> None:
    assert keep.dtype == torch.bool
    assert np.array_equal(keep.numpy(), expected), what


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_unstructured_masks_equal_a_sort(shape: tuple[int, int], sparsity: str) -> None:
    pattern = Unstructured(float(sparsity))
    for what, scores in score_kinds(shape).items():
        rows = keep_rows(f64(scores), count(shape[1], sparsity))
        assert_same(pattern.keep(scores, "row"), rows, f"row, {what}")
        whole = keep_matrix(f64(scores), count(shape[0] * shape[1], sparsity))
        assert_same(pattern.keep(scores, "matrix"), whole, f"matrix, {what}")


@pytest.mark.parametrize(("n", "m"), NMS)
def test_n_m_masks_equal_a_sort(n: int, m: int) -> None:
    for groups in (1, 5):
        for what, scores in score_kinds((7, groups * m)).items():
            assert_same(NM(n, m).keep(scores), keep_nm(f64(scores), n, m), what)


def test_scores_of_any_memory_layout_give_the_same_mask() -> None:
    scores = torch.randn(68, 12).T
    for pattern in (Unstructured(0.3), NM(2, 4)):
        for group in ("row", "matrix"):
            assert torch.equal(pattern.keep(scores, group), pattern.keep(scores.contiguous(), group))


def test_ties_prune_the_lower_index() -> None:
    assert keep_largest(torch.ones(1, 6), 2).tolist() == [[False, False, True, True, True, True]]
    assert keep_largest(torch.tensor([[2.0, 1, 1, 0, 1]]), 3).tolist() == [[True, False, False, False, True]]
    assert NM(1, 4).keep(torch.zeros(1, 8)).tolist() == [[False, False, False, True] * 2]


@pytest.mark.parametrize("prune", [0, 1, 62, 63])
def test_nothing_and_everything_can_be_pruned(prune: int) -> None:
    scores = torch.randint(0, 4, (4, 63)).float()
    assert_same(keep_largest(scores, prune), keep_rows(f64(scores), prune), "")


def test_counts_survive_floating_point() -> None:
    assert pruned_count(100, 0.29) == 29  # 0.29 * 100 = 28.999999999999996
    for hundredths in range(1, 100):
        for size in (1, 7, 63, 100, 128, 1000, 4096 * 11008):
            sparsity = f"0.{hundredths:02d}"
            assert pruned_count(size, float(sparsity)) == count(size, sparsity), (size, sparsity)


def test_n_is_what_is_kept() -> None:
    scores = torch.randn(6, 24)
    few, many = NM(1, 4).keep(scores), NM(3, 4).keep(scores)
    assert few.view(6, 6, 4).sum(-1).unique().tolist() == [1]
    assert many.view(6, 6, 4).sum(-1).unique().tolist() == [3]
    assert NM(1, 4).sparsity == 0.75 and NM(3, 4).sparsity == 0.25


def test_the_patterns_own_group_goes_before_the_criterions() -> None:
    scores = (1 + torch.rand(4, 10)) * torch.tensor([[1.0], [10], [100], [1000]])
    assert Unstructured(0.5, "row").keep(scores, "matrix").sum(1).tolist() == [5, 5, 5, 5]
    assert Unstructured(0.5, "matrix").keep(scores, "row").sum(1).tolist() == [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("text", "sparsity", "expected"),
    [
        ("unstructured", None, Unstructured(0.5)),
        ("unstructured", 0.3, Unstructured(0.3)),
        ("row", 0.3, Unstructured(0.3, "row")),
        ("matrix", None, Unstructured(0.5, "matrix")),
        ("2:4", None, NM(2, 4)),
        ("2:4", 0.5, NM(2, 4)),
        ("1:4", 0.75, NM(1, 4)),
        ("1:3", 0.6666667, NM(1, 3)),
        ("8:16", None, NM(8, 16)),
    ],
)
def test_patterns_as_users_write_them(text: str, sparsity: float | None, expected: object) -> None:
    assert parse_pattern(text, sparsity) == expected


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "2:4:8", "2/4", "-2:4", "2.0:4", " 2:4", "rows", "col", "N:M"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="such as 2:4"):
        parse_pattern(text, None)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_n_must_lie_between_0_and_m(text: str) -> None:
    with pytest.raises(InputError, match="n must be from 1 to m - 1"):
        parse_pattern(text, None)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, 50, float("nan"), float("inf")])
@pytest.mark.parametrize("text", ["unstructured", "row", "2:4"])
def test_a_sparsity_outside_0_and_1_is_refused(text: str, sparsity: float) -> None:
    with pytest.raises(InputError, match="outside"):
        parse_pattern(text, sparsity)


def test_a_sparsity_that_contradicts_n_m_is_refused() -> None:
    for text, sparsity in (("2:4", 0.6), ("1:4", 0.25), ("3:4", 0.75)):
        with pytest.raises(InputError, match="leave --sparsity out"):
            parse_pattern(text, sparsity)


@pytest.mark.parametrize("width", [63, 66, 1])
def test_a_width_that_m_does_not_divide_names_the_site(width: int) -> None:
    with pytest.raises(InputError, match=rf"h\.0\.fc has {width} inputs"):
        NM(2, 4).check("h.0.fc", width)
    NM(2, 4).check("h.0.fc", 68)
    Unstructured(0.5).check("h.0.fc", width)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.29), NM(2, 4), NM(8, 16)])
def test_a_pattern_prints_as_it_is_written(pattern: Unstructured | NM) -> None:
    text = str(pattern)
    assert parse_pattern(text, None) == pattern if ":" in text else float(text) == pattern.sparsity
