"""Swaps against brute force: every single exchange, and on narrow rows every mask."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from literal import Matrix, damped, f64, inputs, weights
from torch import Tensor

from llmprune import swaps as module
from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.swaps import swap

ENOUGH = 1000  # rounds: until nothing is left to gain


def problem(width: int, rows: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A damped Gram matrix of correlated inputs, and weights."""
    H = damped(f64(inputs(4 * width, width, seed)))
    return torch.from_numpy(H / H.diagonal().mean()).float(), weights(rows, width, seed)


def error(H: Matrix, goal: Matrix, keep: Matrix) -> float:
    """e H e^T of one row."""
    e = np.where(keep, 0.0, goal)
    return float(e @ H @ e)


def exchanges(keep: Matrix, m: int | None) -> list[Matrix]:
    """All masks that one exchange leads to; with m, within groups of m."""
    found = []
    for p in np.flatnonzero(keep):
        for r in np.flatnonzero(~keep):
            if m is None or p // m == r // m:
                other = keep.copy()
                other[p], other[r] = False, True
                found.append(other)
    return found


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.25), NM(2, 4), NM(1, 4), NM(4, 8)])
@pytest.mark.parametrize("width", [8, 24, 32])
def test_the_end_is_a_local_optimum_of_all_single_exchanges(width: int, pattern: Pattern) -> None:
    H, goal = problem(width)
    keep = pattern.keep(torch.rand_like(goal), "row")
    refined = swap(H, goal, keep, pattern, ENOUGH)
    m = pattern.m if isinstance(pattern, NM) else None
    for w, mask in zip(f64(goal), refined.numpy(), strict=True):
        best = min(error(f64(H), w, other) for other in exchanges(mask, m))
        assert best >= error(f64(H), w, mask) * (1 - 1e-5)


@pytest.mark.parametrize(("pattern", "share"), [(Unstructured(0.5), 0.5), (NM(2, 4), 0.6), (NM(4, 8), 0.5)])
def test_most_narrow_rows_reach_the_best_of_all_masks(pattern: Pattern, share: float) -> None:
    """Exchanges of one pair can end in a local optimum; they must find the best mask often, and never be below it."""
    H, goal = problem(8, rows=60)
    keep = pattern.keep(goal.square() * H.diagonal(), "row")
    refined = swap(H, goal, keep, pattern, ENOUGH)
    masks = [np.isin(np.arange(8), kept) for kept in combinations(range(8), 4)]
    if pattern == NM(2, 4):
        masks = [mask for mask in masks if mask[:4].sum() == 2]
    reached = 0
    for w, mask in zip(f64(goal), refined.numpy(), strict=True):
        best = min(error(f64(H), w, other) for other in masks)
        ours = error(f64(H), w, mask)
        assert ours >= best * (1 - 1e-9)
        reached += ours <= best * (1 + 1e-6)
    assert reached >= share * len(goal)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8), NM(1, 4)])
@pytest.mark.parametrize("width", [64, 136, 264])
@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_no_row_gets_worse_and_every_count_stays(width: int, pattern: Pattern, rounds: int) -> None:
    H, goal = problem(width)
    keep = pattern.keep(goal.square() * H.diagonal(), "row")
    refined = swap(H, goal, keep, pattern, rounds)
    assert torch.equal(refined.sum(1), keep.sum(1))
    if isinstance(pattern, NM):
        assert (refined.view(20, -1, pattern.m).sum(-1) == pattern.n).all()
    before, after = (
        np.array([error(f64(H), w, row) for w, row in zip(f64(goal), mask.numpy(), strict=True)])
        for mask in (keep, refined)
    )
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()


def test_more_rounds_gain_more() -> None:
    H, goal = problem(264)
    keep = Unstructured(0.5).keep(goal.square() * H.diagonal(), "row")
    errors = []
    for rounds in (0, 2, 8, 32):
        refined = swap(H, goal, keep, Unstructured(0.5), rounds)
        errors.append(sum(error(f64(H), w, row) for w, row in zip(f64(goal), refined.numpy(), strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_uncorrelated_inputs_keep_the_largest(pattern: Pattern) -> None:
    H, goal = torch.diag(torch.rand(64) + 0.1), weights(20, 64)
    best = pattern.keep(goal.square() * H.diagonal(), "row")
    assert torch.equal(swap(H, goal, best, pattern), best)
    assert torch.equal(swap(H, goal, pattern.keep(torch.rand_like(goal), "row"), pattern, ENOUGH), best)


def test_masks_with_nothing_to_exchange_stay() -> None:
    H, goal = problem(16)
    for keep in (torch.ones(20, 16, dtype=torch.bool), torch.zeros(20, 16, dtype=torch.bool)):
        assert torch.equal(swap(H, goal, keep, Unstructured(0.5)), keep)


def test_the_size_of_a_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    H, goal = problem(64)
    keep = torch.rand_like(goal) > 0.5
    whole = swap(H, goal, keep, Unstructured(0.5))
    monkeypatch.setattr(module, "CHUNK", 3 * 64)
    assert torch.equal(swap(H, goal, keep, Unstructured(0.5)), whole)
