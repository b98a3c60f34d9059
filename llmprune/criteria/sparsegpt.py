"""SparseGPT: prune column by column, and let the columns still to come make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.criteria.base import Criterion, Pruned
from llmprune.errors import InputError
from llmprune.gram import full_float32
from llmprune.patterns import NM, Pattern, Uniform, Unstructured
from llmprune.sites import Site

BLOCK = 128
DAMPING = 0.01


class SparseGPT(Criterion):
    """Optimal brain surgeon in column order with lazy blocks. arXiv 2301.00774.

    With U^T U = (G + damping)^-1, a column's error e = w_j / U_jj is spread over the later columns by the
    row U_j. Unstructured sparsity is exact in every block of 128 columns over all rows; n:m groups are chosen on the
    already updated weights. Where a bias moves, the covariance takes the place of the Gram matrix.
    """

    name = "sparsegpt"
    summary = "second-order pruning with weight update, column by column"
    source = "Frantar and Alistarh, arXiv 2301.00774"
    needs = frozenset({"gram"})
    moves_weights = True

    def check(self, pattern: Pattern) -> None:
        """Its unstructured pattern is its own: blocks of columns."""
        if isinstance(pattern, Uniform):
            raise InputError("sparsegpt prunes single weights: for whole units by the same measure use --method obs")
        if isinstance(pattern, Unstructured) and pattern.group is not None:
            raise InputError(
                f"sparsegpt balances its sparsity over blocks of {BLOCK} columns, not per {pattern.group}: "
                "use --pattern unstructured"
            )

    def group_name(self, pattern: Pattern) -> str:
        """Which weights compete, in words."""
        return f"block of {BLOCK} columns" if isinstance(pattern, Unstructured) else super().group_name(pattern)

    def score(self, site: Site) -> Tensor:
        """[out, in], W^2 / diag(U)^2 of the dense weights: the first decision, before any update."""
        assert site.statistics is not None and site.statistics.gram is not None
        U, _ = site.statistics.gram.inverse_factor(DAMPING, self.compensates(site))
        return (site.goal / U.diagonal()).square()

    def prune(self, site: Site, pattern: Pattern) -> Pruned:
        """Choose and update, block after block of columns."""
        assert site.statistics is not None and site.statistics.gram is not None
        gram, centred = site.statistics.gram, self.compensates(site)
        try:
            U, damping = gram.inverse_factor(DAMPING, centred)
        except InputError as error:
            raise InputError(f"{site.name}: {error}") from error
        # [in, out]: a column of the paper is a contiguous row here. Always a copy: a Conv1D is stored that way.
        W = site.goal.T.clone(memory_format=torch.contiguous_format)
        dead = gram.matrix_of(centred).diagonal() == 0  # whatever their weights are, the output is the same
        W[dead] = 0.0
        keep = torch.ones_like(W, dtype=torch.bool)
        with full_float32():
            for start, stop in _column_blocks(len(W), pattern):
                errors = _prune_columns(W, keep, U, start, stop, pattern)
                W[stop:] -= U[start:stop, stop:].T @ errors
        notes = [f"damping {damping:g}"] * (damping != DAMPING)
        if dead.any():
            how = "varied" if centred else "active"
            notes.append(f"{int(dead.sum())} inputs never {how}, their weights set to zero")
        weight, shift = (W * keep).T, None
        if centred:
            shift = site.bias_shift(weight)
        elif self.wants_bias(site):
            notes.append("no bias to move")
        return Pruned(weight, keep.T, shift, "; ".join(notes))


def _column_blocks(width: int, pattern: Pattern) -> list[tuple[int, int]]:
    """Column ranges of about BLOCK columns; groups of m never straddle two of them."""
    size = max(BLOCK // pattern.m, 1) * pattern.m if isinstance(pattern, NM) else BLOCK
    return [(start, min(start + size, width)) for start in range(0, width, size)]


def _prune_columns(W: Tensor, keep: Tensor, U: Tensor, start: int, stop: int, pattern: Pattern) -> Tensor:
    """Prune columns [start, stop) of W [in, out] in place; returns their errors [stop - start, out]."""
    block, kept, factor = W[start:stop], keep[start:stop], U[start:stop, start:stop]
    diagonal = factor.diagonal()[:, None].clone()
    size = pattern.m if isinstance(pattern, NM) else stop - start
    errors = torch.empty_like(block)
    for group in (slice(j, min(j + size, stop - start)) for j in range(0, stop - start, size)):
        # Decided on the weights as they are by now.
        scores = (block[group] / diagonal[group]).square().T
        kept[group] = pattern.keep(scores, "matrix").T
        share = (~kept[group]).float() / diagonal[group]  # what of a weight becomes error: 1 / U_jj or nothing
        for j in range(group.start, group.stop):
            torch.mul(block[j], share[j - group.start], out=errors[j])
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return errors
