"""Refinement: exchange kept and pruned weights of a row while its output error falls."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.gram import full_float32
from llmprune.patterns import NM, Pattern

ROUNDS = 20
CANDIDATES = 32
CHUNK = 2**24
"""Entries of the rows that are refined together: some ten float32 buffers of that size are alive."""


def swap(H: Tensor, goal: Tensor, keep: Tensor, pattern: Pattern, rounds: int = ROUNDS) -> Tensor:
    """A mask with the same count in every row (and group of n:m) whose error is nowhere larger.

    The error of a row is e H e^T, e being what is pruned of its goal. With g = e H, pruning the kept p and
    reviving the pruned r of one row changes it by exactly

        D = 2 w_p g_p + w_p^2 H_pp  -  2 w_r g_r + w_r^2 H_rr  -  2 w_p w_r H_pr.

    Every round proposes several exchanges for every row at once and measures them together: one matrix product.
    A row that they do not improve takes them back and proposes half as many; at one it proposes its best.

    Args:
        H: [in, in] float32, symmetric, positive definite.
        goal: [out, in] float32, the weights without a mask.
        keep: bool [out, in], the mask to begin with.
        pattern: n:m exchanges within its groups, anything else within rows.
        rounds: bound on the matrix products.
    """
    refined = keep.clone()
    step = max(1, CHUNK // goal.shape[1])
    with full_float32():
        for rows in (slice(start, start + step) for start in range(0, len(goal), step)):
            refined[rows] = _swap_rows(H, goal[rows], keep[rows], pattern, rounds)
    return refined


def _swap_rows(H: Tensor, goal: Tensor, keep: Tensor, pattern: Pattern, rounds: int) -> Tensor:
    result = keep.clone()
    where = torch.arange(len(goal), device=goal.device)  # the rows still at work
    gradient, error = _measure(H, goal, keep)
    most = torch.full_like(where, max(1, min(CANDIDATES, goal.shape[1] // 16)))
    for _ in range(rounds):
        change, out, back = _proposals(H, goal, keep, gradient, pattern)
        rank = torch.arange(change.shape[1], device=goal.device)
        taken = (rank < most[:, None]) & (change < 0)
        trial = (keep & ~_marked(keep, out, taken)) | _marked(keep, back, taken)
        tried_gradient, tried_error = _measure(H, goal, trial)
        better = taken.any(1) & (tried_error < error)
        finished = ~better & ((most == 1) | ~taken.any(1))
        most = torch.where(better, most, most // 2)
        keep, error = torch.where(better[:, None], trial, keep), torch.where(better, tried_error, error)
        gradient = torch.where(better[:, None], tried_gradient, gradient)
        result[where] = keep
        if bool(finished.all()):
            break
        if bool(finished.any()):
            left = ~finished
            where, goal, keep, gradient = where[left], goal[left], keep[left], gradient[left]
            error, most = error[left], most[left]
    return result


def _marked(like: Tensor, index: Tensor, taken: Tensor) -> Tensor:
    """bool like `like`, True at the indices [rows, k] that are taken; an index may come twice."""
    return torch.zeros_like(like, dtype=torch.uint8).scatter_add_(1, index, taken.byte()).bool()


def _measure(H: Tensor, goal: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient e H [rows, in] and error e H e^T [rows]."""
    pruned = goal.masked_fill(keep, 0.0)
    gradient = pruned @ H
    return gradient, (pruned * gradient).sum(1)


def _proposals(H: Tensor, goal: Tensor, keep: Tensor, gradient: Tensor, pattern: Pattern) -> tuple[Tensor, ...]:
    """Changes [rows, k] in ascending order, and the indices [rows, k] that they prune and revive.

    No finite change shares an index with another of its row. The first is the best exchange of all candidates.
    """
    energy = goal.square() * H.diagonal()
    linear = 2 * goal * gradient
    prune = (energy + linear).masked_fill(~keep, torch.inf)
    revive = (energy - linear).masked_fill(keep, torch.inf)
    if isinstance(pattern, NM):
        return _proposals_in_groups(H, goal, prune, revive, pattern.m)
    return _proposals_in_rows(H, goal, prune, revive)


def _proposals_in_groups(H: Tensor, goal: Tensor, prune: Tensor, revive: Tensor, m: int) -> tuple[Tensor, ...]:
    """The best exchange of every group of m, the best groups first."""
    rows, width = goal.shape
    groups = width // m
    blocks = H.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, m, m]
    w = goal.view(rows, groups, m)
    change = prune.view(rows, groups, m, 1) + revive.view(rows, groups, 1, m)
    change = (change - 2 * w[..., :, None] * w[..., None, :] * blocks).flatten(2)
    best, pair = change.min(2)
    best, order = best.topk(min(CANDIDATES, groups), dim=1, largest=False, sorted=True)
    pair = pair.gather(1, order)
    return best, order * m + pair // m, order * m + pair % m


def _proposals_in_rows(H: Tensor, goal: Tensor, prune: Tensor, revive: Tensor) -> tuple[Tensor, ...]:
    """The cheapest to prune paired with the dearest to revive; before them the best pair of all."""
    count = min(CANDIDATES, goal.shape[1])
    a, out = prune.topk(count, dim=1, largest=False, sorted=True)
    b, back = revive.topk(count, dim=1, largest=False, sorted=True)
    w_out, w_back = goal.gather(1, out), goal.gather(1, back)
    change = (
        a[:, :, None]
        + b[:, None, :]
        - 2 * w_out[:, :, None] * w_back[:, None, :] * H[out[:, :, None], back[:, None, :]]
    )
    best, pair = change.flatten(1).min(1, keepdim=True)
    i, j = pair // count, pair % count
    # The best pair comes first; the i-th of one list goes with the i-th of the other, where both are still free.
    rank = torch.arange(count, device=goal.device)
    paired = change.diagonal(dim1=1, dim2=2).masked_fill((rank == i) | (rank == j), torch.inf)
    paired, order = paired.sort(1)
    return (
        torch.cat([best, paired], 1),
        torch.cat([out.gather(1, i), out.gather(1, order)], 1),
        torch.cat([back.gather(1, j), back.gather(1, order)], 1),
    )
