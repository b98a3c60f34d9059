"""Refinement: exchange kept and pruned weights of a row while its output error falls."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.gram import full_float32
from llmprune.patterns import NM, Pattern

ROUNDS = 6
CANDIDATES = (8, 64)
"""Exchanges proposed for a row in one round: one for every 64 inputs, but never fewer or more than these."""
NARROW = 16
"""Up to so many kept and pruned weights each, the best pair is looked for among all of a row."""
NEVER = 1e30
"""What an impossible exchange costs. Finite, as sums are several times faster than fills on a CPU."""
CHUNK = 2**24
"""Entries of the rows that are refined together: some ten float32 buffers of that size are alive."""


def swap(H: Tensor, goal: Tensor, keep: Tensor, pattern: Pattern, rounds: int = ROUNDS) -> Tensor:
    """A mask with the same count in every row (and group of n:m) whose error is nowhere larger.

    The error of a row is e H e^T, e being what is pruned of its goal. With g = e H, pruning the kept p and
    reviving the pruned r of one row changes it by exactly

        D = 2 w_p g_p + w_p^2 H_pp  -  2 w_r g_r + w_r^2 H_rr  -  2 w_p w_r H_pr.

    Every round proposes several exchanges for every row, and takes of them, one after the other, what still lowers
    the error with those taken before: two exchanges d and f, as changes of e, add 2 d H f to each other. Then the
    gradient is measured anew: one matrix product a round.

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
    kept = keep.float()
    energy = goal.square() * H.diagonal()
    gradient, error = _measure(H, goal, kept)
    for _ in range(rounds):
        change, out, back = _proposals(H, goal, kept, energy, gradient, pattern)
        taken = _chosen(H, goal, change, out, back).float()
        trial = kept.scatter_add(1, out, -taken).scatter_add(1, back, taken)
        gradient, tried = _measure(H, goal, trial)
        better = tried < error  # but for rounding, of every row with an exchange
        if not bool(better.any()):
            break
        where, goal, kept, energy = where[better], goal[better], trial[better], energy[better]
        gradient, error = gradient[better], tried[better]
        result[where] = kept.bool()
    return result


def _chosen(H: Tensor, goal: Tensor, change: Tensor, out: Tensor, back: Tensor) -> Tensor:
    """Which exchanges [rows, k] to take together: the best, the best of the others behind it, and so on."""
    rows, k = change.shape
    index = torch.cat([out, back], 1)
    weight = torch.cat([goal.gather(1, out), -goal.gather(1, back)], 1)
    pairs = H.take(index[:, :, None] * len(H) + index[:, None, :]) * weight[:, :, None] * weight[:, None, :]
    above, below = pairs.view(rows, 2, k, 2, k).unbind(1)
    above, below = above[:, :, 0] + above[:, :, 1], below[:, :, 0] + below[:, :, 1]
    between = 2 * (above + below)
    change = change.clone()
    taken = torch.zeros_like(change, dtype=torch.bool)
    for _ in range(k):
        best, at = change.min(1, keepdim=True)
        if not bool((best < 0).any()):
            break
        taken.scatter_(1, at, taken.gather(1, at) | (best < 0))
        change += between.gather(1, at[:, :, None].expand(-1, 1, k))[:, 0] * (best < 0)
        change.scatter_(1, at, NEVER)
    return taken


def _measure(H: Tensor, goal: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient e H [rows, in] and error e H e^T [rows]; `kept` is 1 or 0."""
    pruned = goal - goal * kept
    gradient = pruned @ H
    return gradient, (pruned * gradient).sum(1)


def _proposals(
    H: Tensor, goal: Tensor, kept: Tensor, energy: Tensor, gradient: Tensor, pattern: Pattern
) -> tuple[Tensor, ...]:
    """Changes [rows, k], and the indices [rows, k] that they prune and revive.

    No possible exchange shares an index with another of its row. The best exchange of all candidates is among them.
    """
    linear = 2 * goal * gradient
    prune = energy + linear + NEVER * (1 - kept)
    revive = energy - linear + NEVER * kept
    count = min(max(CANDIDATES[0], goal.shape[1] // 64), CANDIDATES[1])
    if isinstance(pattern, NM):
        return _proposals_in_groups(H, goal, prune, revive, pattern.m, count)
    return _proposals_in_rows(H, goal, prune, revive, count)


def _proposals_in_groups(
    H: Tensor, goal: Tensor, prune: Tensor, revive: Tensor, m: int, count: int
) -> tuple[Tensor, ...]:
    """The best exchange of each of the best groups of m."""
    rows, width = goal.shape
    groups = width // m
    blocks = H.view(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, m, m]
    w = goal.view(rows, groups, m)
    change = prune.view(rows, groups, m, 1) + revive.view(rows, groups, 1, m)
    change = (change - 2 * w[..., :, None] * w[..., None, :] * blocks).flatten(2)
    best, pair = change.min(2)
    best, order = best.topk(min(count, groups), dim=1, largest=False, sorted=False)
    pair = pair.gather(1, order)
    return best, order * m + pair // m, order * m + pair % m


def _proposals_in_rows(H: Tensor, goal: Tensor, prune: Tensor, revive: Tensor, count: int) -> tuple[Tensor, ...]:
    """The best pair, then the cheapest to prune with the best to revive."""
    wide = min(max(count, NARROW), goal.shape[1])
    a, out = prune.topk(wide, dim=1, largest=False, sorted=True)
    b, back = revive.topk(wide, dim=1, largest=False, sorted=True)
    w_out, w_back = goal.gather(1, out), goal.gather(1, back)
    pairs = H.take(out[:, :, None] * len(H) + back[:, None, :])
    change = a[:, :, None] + b[:, None, :] - 2 * pairs * w_out[:, :, None] * w_back[:, None, :]
    best, pair = change.flatten(1).min(1, keepdim=True)
    i, j = pair // wide, pair % wide
    # The i-th of one list goes with the i-th of the other, where both are still free.
    rank = torch.arange(min(count, wide), device=goal.device)
    paired = change.diagonal(dim1=1, dim2=2)[:, : len(rank)].masked_fill((rank == i) | (rank == j), NEVER)
    return (
        torch.cat([best, paired], 1),
        torch.cat([out.gather(1, i), out[:, : len(rank)]], 1),
        torch.cat([back.gather(1, j), back[:, : len(rank)]], 1),
    )
