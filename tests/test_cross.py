"""The covariance of two streams of rows, against float64."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from literal import Matrix, f64
from torch import Tensor

from llmprune.cross import Cross

ROWS, COLUMNS, PAIRS = 13, 9, 500
SPLITS = [(PAIRS,), (1,) * PAIRS, (7, 300, 1, 192), (250, 250)]


def pairs(z_mean: float = 0.0, x_mean: float = 0.0) -> tuple[Tensor, Tensor]:
    """z [n, rows] and x [n, columns], correlated, of standard deviation 1 or so around their means."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(PAIRS, COLUMNS, generator=generator)
    mixed = x @ torch.randn(COLUMNS, ROWS, generator=generator) / COLUMNS**0.5
    z = 0.7 * mixed + 0.7 * torch.randn(PAIRS, ROWS, generator=generator)
    return z + z_mean * torch.randn(ROWS, generator=generator), x + x_mean * torch.randn(COLUMNS, generator=generator)


def seen(z: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Cross:
    cross = Cross(ROWS, COLUMNS)
    for part in zip(z.split(sizes), x.split(sizes), strict=True):
        cross.update(*part)
    return cross


def covariance(z: Matrix, x: Matrix) -> Matrix:
    return np.asarray((z - z.mean(0)).T @ (x - x.mean(0)))


def assert_near(found: Tensor, expected: Matrix, tolerance: float) -> None:
    """In terms of the largest entry: of a sum of products the small ones are known no better."""
    assert found.dtype == torch.float32
    assert np.abs(f64(found) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
def test_both_matrices_and_the_means(sizes: tuple[int, ...], mean: float) -> None:
    z, x = pairs(mean, mean)
    cross = seen(z, x, sizes)
    Z, X = f64(z), f64(x)
    assert cross.count == PAIRS
    assert_near(cross.matrix(centred=True), covariance(Z, X), 1e-5 if mean < 1000 else 1e-3)
    assert_near(cross.matrix(centred=False), Z.T @ X, 1e-5)
    assert_near(cross.z_mean, Z.mean(0), 1e-5)
    assert_near(cross.x_mean, X.mean(0), 1e-5)


def test_an_offset_is_taken_from_what_is_not_centred() -> None:
    z, x = pairs(3.0, 2.0)
    cross = seen(z, x, SPLITS[2])
    offset = torch.linspace(-5, 5, ROWS)
    assert_near(cross.matrix(False, offset), (f64(z) - f64(offset)).T @ f64(x), 1e-5)
    assert_near(cross.matrix(False, 2.0), (f64(z) - 2.0).T @ f64(x), 1e-5)
    assert torch.equal(cross.matrix(True, offset), cross.matrix(True))


def test_a_large_mean_would_ruin_the_textbook_form() -> None:
    """It is what the merging of means is for."""
    z, x = pairs(1000.0, 1000.0)
    expected = covariance(f64(z), f64(x))
    textbook = z.T @ x - PAIRS * torch.outer(z.mean(0), x.mean(0))
    assert np.abs(f64(textbook) - expected).max() > 0.05 * np.abs(expected).max()


def test_no_pairs_change_nothing() -> None:
    z, x = pairs(3.0, 2.0)
    cross = seen(z, x, (PAIRS,))
    before = [part.clone() for part in (cross.matrix(True), cross.matrix(False), cross.z_mean, cross.x_mean)]
    cross.update(z[:0], x[:0])
    after = [cross.matrix(True), cross.matrix(False), cross.z_mean, cross.x_mean]
    assert cross.count == PAIRS
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    empty = Cross(ROWS, COLUMNS, of_output=True)
    empty.update(z[:0], x[:0])
    assert empty.count == 0 and empty.of_output
    assert empty.finite() and not empty.matrix(False).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_noticed(value: float, side: int) -> None:
    parts = pairs()
    cross = seen(*parts, (PAIRS,))
    assert cross.finite()
    parts[side][3, 5] = value
    cross.update(parts[0][:10], parts[1][:10])
    assert not cross.finite()
    cross.update(parts[0][10:], parts[1][10:])
    assert not cross.finite()


@pytest.mark.parametrize("first", [0, 1, 123, PAIRS])
def test_two_ranks_reduce_to_the_whole(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks are threads that exchange what two processes would."""
    z, x = pairs(1000.0, 10.0)
    ranks = [seen(z[:first], x[:first], (first,)), seen(z[first:], x[first:], (PAIRS - first,))]
    offered: dict[str, Tensor] = {}
    barrier = threading.Barrier(2, timeout=10)

    def gathered(value: Tensor) -> list[Tensor]:
        offered[threading.current_thread().name] = value.clone()
        barrier.wait()
        parts = [offered["0"], offered["1"]]
        barrier.wait()
        return parts

    def summed_(value: Tensor) -> None:
        value.copy_(torch.stack(gathered(value)).sum(0))

    exchange: dict[str, Any] = {"gathered": gathered, "summed_": summed_}
    for name, function in exchange.items():
        monkeypatch.setattr(f"llmprune.cross.{name}", function)
    threads = [threading.Thread(target=rank.all_reduce_, name=str(i)) for i, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in ranks:
        assert rank.count == PAIRS
        assert_near(rank.matrix(True), covariance(f64(z), f64(x)), 1e-3)
        assert_near(rank.matrix(False), f64(z).T @ f64(x), 1e-5)
        assert torch.equal(rank.matrix(True), ranks[0].matrix(True))
        assert torch.equal(rank.z_mean, ranks[0].z_mean) and torch.equal(rank.x_mean, ranks[0].x_mean)
