"""Compensation: the best weights on a given support, for all rows of a site at once."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3
ITERATIONS = 100
CHUNK = 2**26
"""Entries of the rows that are solved together: six such float32 buffers are alive at a time."""


def least_squares(H: Tensor, goal: Tensor, keep: Tensor) -> tuple[Tensor, float]:
    """Minimise (w - goal) H (w - goal)^T over the weights w that `keep` lets live, row by row.

    On the support S of a row that is the solution of H_SS w_S = (H goal)_S. Conjugate gradients preconditioned
    by the diagonal, the mask applied to every step, so that one iteration is one matrix product for all rows
    whatever their supports are.

    Args:
        H: [in, in] float32, symmetric, positive definite (damped).
        goal: [out, in] float32, the minimum without a mask.
        keep: bool [out, in].

    Returns:
        [out, in] float32, zero where not kept, and ||residual|| over all rows as a share of what it is where the
        survivors keep their weights.
    """
    if bool((keep == keep[0]).all()):
        return _on_columns(H, goal, keep[0])
    solved = torch.empty_like(goal)
    wrong = whole = 0.0
    for rows in _row_chunks(goal):
        solved[rows], squares = _conjugate_gradients(H, goal[rows], keep[rows])
        wrong, whole = wrong + squares[0], whole + squares[1]
    return solved, (wrong / whole) ** 0.5 if whole > 0 else 0.0


def _on_columns(H: Tensor, goal: Tensor, keep: Tensor) -> tuple[Tensor, float]:
    """The solution where every row has the support `keep` [in]: one factorisation serves all."""
    if bool(keep.all()):
        return goal.clone(), 0.0
    columns = keep.nonzero().flatten()
    inner = H.index_select(0, columns).index_select(1, columns)
    wanted = goal @ H.index_select(1, columns)
    solution = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(inner)).T
    before = (wanted - goal.index_select(1, columns) @ inner).norm()
    residual = (wanted - solution @ inner).norm()
    solved = torch.zeros_like(goal).index_copy_(1, columns, solution)
    return solved, (residual / before).item() if before > 0 else 0.0


def _row_chunks(goal: Tensor) -> list[slice]:
    step = max(1, CHUNK // goal.shape[1])
    return [slice(start, start + step) for start in range(0, len(goal), step)]


def _conjugate_gradients(H: Tensor, goal: Tensor, keep: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """The solution of some rows, and the squares of its residual and of the masked weights' residual."""
    mask, scale = keep.float(), 1 / H.diagonal()
    w = goal * mask
    residual = ((goal - w) @ H).mul_(mask)
    step = residual * scale
    slope = (residual * step).sum(1, keepdim=True)
    before = residual.square().sum()
    for _ in range(ITERATIONS):
        if residual.square().sum() <= TOLERANCE**2 * before:
            break
        image = (step @ H).mul_(mask)
        length = slope / (step * image).sum(1, keepdim=True).clamp(min=torch.finfo(H.dtype).tiny)
        w += length * step
        residual -= length * image
        last, slope = slope, (residual.square() * scale).sum(1, keepdim=True)
        step = residual * scale + slope / last.clamp(min=torch.finfo(H.dtype).tiny) * step
    return w, (residual.square().sum().item(), before.item())
