"""Least squares on a support against solves of one row after the other in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import Matrix, damped, f64, inputs, row_by_row, weights
from torch import Tensor
from torch.testing import assert_close

from llmprune import least_squares as module
from llmprune.least_squares import least_squares
from llmprune.patterns import NM, Pattern, Unstructured

PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8), NM(1, 4)]


def problem(width: int, rows: int = 20) -> tuple[Tensor, Tensor]:
    """A damped Gram matrix of correlated inputs, and weights."""
    H = damped(f64(inputs(4 * width, width)))
    return torch.from_numpy(H / H.diagonal().mean()).float(), weights(rows, width)


def error(H: Matrix, change: Matrix) -> Matrix:
    """[rows], e H e^T."""
    return np.einsum("ri,ij,rj->r", change, H, change)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("width", [8, 64, 136, 264])
def test_every_row_is_solved(width: int, pattern: Pattern) -> None:
    H, goal = problem(width)
    keep = pattern.keep(torch.rand_like(goal), "row")
    solved, residual = least_squares(H, goal, keep)
    expected = row_by_row(f64(H), f64(goal), keep.numpy())
    assert residual <= module.TOLERANCE
    assert not solved[~keep].any()
    ours, best = (error(f64(H), w - f64(goal)) for w in (f64(solved), expected))
    assert ours == pytest.approx(best, rel=1e-4)
    assert_close(solved.double(), torch.from_numpy(expected), rtol=0, atol=1e-2 * float(goal.abs().max()))


@pytest.mark.parametrize("width", [8, 132])
def test_a_full_support_gives_the_goal_back(width: int) -> None:
    H, goal = problem(width)
    solved, residual = least_squares(H, goal, torch.ones_like(goal, dtype=torch.bool))
    assert torch.equal(solved, goal)
    assert residual < 1e-5


def test_rows_without_support_and_goals_of_zero_are_no_obstacle() -> None:
    H, goal = problem(64)
    keep = torch.rand_like(goal) > 0.5
    keep[3], goal[5] = False, 0.0
    solved, _ = least_squares(H, goal, keep)
    assert torch.isfinite(solved).all()
    assert not solved[3].any()
    assert not solved[5].any()
    assert least_squares(H, goal, torch.zeros_like(keep))[1] == 0


def test_it_never_does_worse_than_the_masked_weights() -> None:
    H, goal = problem(132)
    keep = torch.rand_like(goal) > 0.6
    solved, _ = least_squares(H, goal, keep)
    assert (error(f64(H), f64(solved - goal)) < error(f64(H), f64(goal * keep - goal))).all()


def test_uncorrelated_inputs_move_nothing() -> None:
    goal = weights(20, 64)
    keep = torch.rand_like(goal) > 0.5
    assert_close(least_squares(torch.diag(torch.rand(64) + 0.1), goal, keep)[0], goal * keep)


def test_the_size_of_a_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    H, goal = problem(64)
    keep = torch.rand_like(goal) > 0.5
    whole, _ = least_squares(H, goal, keep)
    monkeypatch.setattr(module, "CHUNK", 3 * 64)
    assert_close(least_squares(H, goal, keep)[0], whole, rtol=0, atol=3e-2)  # each chunk stops by its own residual
