"""Moments against float64 sums over all rows at once, whatever way the rows came."""

from __future__ import annotations

import pytest
import torch
from literal import inputs
from torch import Tensor
from torch.testing import assert_close

from llmprune.inputs import InputStatistics
from llmprune.moments import Moments


def literal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 [in] of rows x, one row after the other, in float64."""
    mean, m2 = torch.zeros(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
    for row in x.double():
        mean += row
    mean /= len(x)
    for row in x.double():
        m2 += (row - mean) ** 2
    return mean, m2


def seen(*parts: Tensor) -> Moments:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.update(part)
    return moments


def assert_moments(moments: Moments, x: Tensor, rtol: float = 1e-6) -> None:
    """Means are compared relative to the size of the feature: one near 0 has no relative precision."""
    mean, m2 = literal(x)
    size = x.double().square().mean(0).sqrt()
    assert moments.count == len(x)
    assert float(((moments.mean.double() - mean).abs() / size).max()) < rtol
    assert_close(moments.m2.double(), m2, rtol=rtol, atol=0)


@pytest.mark.parametrize("batch", [1, 2, 7, 11])
def test_batches_of_any_size_give_the_same_moments(batch: int) -> None:
    windows = inputs(11 * 24, 68, seed=3).view(11, 24, 68)
    statistics = InputStatistics(68, {"moments"})
    for part in windows.split(batch):  # 2 and 7 leave a ragged last batch
        statistics.update(part)
    assert statistics.moments is not None
    assert_moments(statistics.moments, windows.flatten(0, 1))


def test_token_by_token_is_still_accurate() -> None:
    x = inputs(211, 63, seed=4)
    assert_moments(seen(*x.split(1)), x, rtol=5e-6)


def test_merging_in_any_order_equals_seeing_everything() -> None:
    x = inputs(301, 63, seed=5)
    a, b, c = x[:1], x[1:98], x[98:]
    for order in ((a, b, c), (c, a, b), (b, c, a)):
        left, right = seen(order[0]), seen(order[1])
        right.merge(seen(order[2]))
        left.merge(right)
        assert_moments(left, x)


def test_a_large_mean_with_a_tiny_variance_does_not_cancel() -> None:
    x = 1e3 + 1e-2 * torch.randn(500, 9)
    for moments in (seen(x), seen(*x.split(7))):
        mean, m2 = literal(x)
        assert_close(moments.mean.double(), mean, rtol=1e-6, atol=0)
        assert_close(moments.variance.double(), m2 / 499, rtol=2e-3, atol=0)
    naive = x.square().mean(0) - x.mean(0).square()
    assert float((naive.double() - m2 / 500).abs().max()) > 1e-3  # ten times the variance: the trap is real


def test_an_empty_update_and_an_empty_merge_change_nothing() -> None:
    x = inputs(50, 12)
    moments = seen(x[:0], x, x[:0])
    moments.merge(Moments(12))
    assert_moments(moments, x)
    fresh = Moments(12)
    fresh.merge(seen(x))
    assert_moments(fresh, x)


def test_moments_of_nothing_and_of_one_token_are_finite() -> None:
    nothing, one = Moments(5), seen(torch.full((1, 5), 3.0))
    assert nothing.count == 0 and nothing.finite()
    for values in (nothing.variance, nothing.energy, one.variance):
        assert values.tolist() == [0.0] * 5
    assert one.energy.tolist() == [9.0] * 5


def test_variance_divides_by_n_minus_1_and_energy_by_n() -> None:
    x = inputs(37, 20, seed=6)
    moments = seen(x)
    assert_close(moments.variance.double(), x.double().var(0, correction=1), rtol=1e-6, atol=0)
    assert_close(moments.energy.double(), (x.double() ** 2).mean(0), rtol=1e-6, atol=0)


def test_every_leading_axis_is_counted() -> None:
    x = inputs(70, 12, seed=7)
    for shape in ((70, 12), (2, 35, 12), (2, 5, 7, 12)):
        statistics = InputStatistics(12, {"moments", "gram"})
        statistics.update(x.view(shape))
        assert statistics.moments is not None and statistics.gram is not None
        assert (statistics.count, statistics.moments.count, statistics.gram.count) == (70, 70, 70)
        assert_moments(statistics.moments, x)  # sequences instead of tokens would double the mean


def test_half_precision_inputs_are_squared_in_float32() -> None:
    x = torch.full((4, 3), 300.0, dtype=torch.float16)  # its square is infinite in float16
    statistics = InputStatistics(3, {"moments", "gram"})
    statistics.update(x)
    assert statistics.finite()
    assert statistics.energy.tolist() == [90000.0] * 3
    assert statistics.gram is not None and statistics.gram.matrix.tolist() == [[360000.0] * 3] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("need", ["moments", "gram"])
def test_a_token_that_is_not_finite_is_noticed(bad: float, need: str) -> None:
    statistics = InputStatistics(4, {need})
    statistics.update(torch.ones(9, 4))
    assert statistics.finite()
    spoiled = torch.ones(9, 4)
    spoiled[3, 2] = bad
    statistics.update(spoiled)
    statistics.update(torch.ones(9, 4))
    assert not statistics.finite()


def test_merged_statistics_equal_those_of_all_tokens() -> None:
    x = inputs(90, 20, seed=8)
    whole, a, b = (InputStatistics(20, {"moments", "gram"}) for _ in range(3))
    whole.update(x)
    a.update(x[:31])
    b.update(x[31:])
    a.merge(b)
    assert a.count == 90 and a.moments is not None and a.gram is not None and whole.gram is not None
    assert_moments(a.moments, x)
    assert_close(a.gram.matrix, whole.gram.matrix)
    assert len(a.sample) and all(any(torch.equal(row, token) for token in x) for row in a.sample)
