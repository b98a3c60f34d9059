"""Which shapes of zeros are allowed, and the exact choice of the survivors.

Counts are exact and ties go by index (the lower index is pruned first), so that a mask depends on nothing
but the scores. n:m means that n of every m consecutive inputs of a row are KEPT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import InputError

GROUPS = ("row", "matrix")


def pruned_count(size: int, sparsity: float) -> int:
    """How many of `size` entries a sparsity removes: floor, with an epsilon for 0.29 * 100 = 28.999..."""
    return int(size * sparsity + 1e-6)


def keep_largest(scores: Tensor, prune: int) -> Tensor:
    """Keep all but the `prune` smallest of every row; exact under ties.

    Args:
        scores: [rows, n], without NaN.
        prune: entries to remove from each row, 0 <= prune <= n.

    Returns:
        bool [rows, n], True = survives.
    """
    if prune == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(prune, dim=1, keepdim=True).values
    keep = scores > threshold
    surplus = scores.shape[1] - prune - keep.sum(1, keepdim=True)
    if bool((surplus > 0).any()):
        # Entries equal to the threshold: the last `surplus` of them survive as well.
        tied = scores == threshold
        from_the_end = tied.flip(1).cumsum(1).flip(1)
        keep |= tied & (from_the_end <= surplus)
    return keep


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights of every row, or of the whole matrix.

    Attributes:
        sparsity: share of the entries that is pruned, in (0, 1).
        group: "row", "matrix", or None for the criterion's own default.
    """

    sparsity: float
    group: str | None = None

    def keep(self, scores: Tensor, group: str) -> Tensor:
        """bool [out, in] with exactly the promised count in every group; `group` is the default."""
        rows = scores if (self.group or group) == "row" else scores.reshape(1, -1)
        return keep_largest(rows, pruned_count(rows.shape[1], self.sparsity)).view_as(scores)

    def check(self, site: str, width: int) -> None:
        """Any width will do."""

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


@dataclass(frozen=True)
class NM:
    """Keep n of every m consecutive inputs of a row."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Share of the entries that is pruned."""
        return 1 - self.n / self.m

    def keep(self, scores: Tensor, group: str = "row") -> Tensor:
        """bool [out, in] with exactly n survivors in every group of m; `group` has no say here."""
        return keep_largest(scores.reshape(-1, self.m), self.m - self.n).view_as(scores)

    def check(self, site: str, width: int) -> None:
        """Raise InputError where a row cannot be cut into groups of m."""
        if width % self.m:
            raise InputError(
                f"{site} has {width} inputs, which {self.m} does not divide, so it cannot be {self}; "
                f"leave it out with --ignore {site}, or ask for a sparsity instead"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Uniform:
    """Whole units (key/value groups, FFN channels), as many in every block: the result is a smaller plain model.

    Attributes:
        sparsity: share of the decoder's parameters that goes, in (0, 1).
    """

    sparsity: float

    def keep(self, scores: Tensor, group: str) -> Tensor:
        """What stays of one projection is in its own `Columns`."""
        raise AssertionError("a uniform pattern is planned for the whole model before a projection is pruned")

    def check(self, site: str, width: int) -> None:
        """Any width will do."""

    def __str__(self) -> str:
        return f"uniform {self.sparsity:g}"


@dataclass(frozen=True)
class Columns:
    """Some of the units of an output projection: the same columns in all of its rows.

    Attributes:
        size: columns of a unit, side by side.
        kept: units that survive.
    """

    size: int
    kept: int

    def keep(self, scores: Tensor, group: str) -> Tensor:
        """bool [out, in]; a unit's score is the sum over its columns, all rows. `group` has no say here."""
        units = scores.sum(0).view(1, -1, self.size).sum(2)
        keep = keep_largest(units, units.shape[1] - self.kept)[0]
        return keep.repeat_interleave(self.size).expand_as(scores)

    def check(self, site: str, width: int) -> None:
        """It was made for its site."""


RunPattern = Unstructured | NM | Uniform
"""What a user asks for."""
Pattern = RunPattern | Columns


def parse_pattern(text: str, sparsity: float | None) -> RunPattern:
    """Read a pattern as users write it.

    Args:
        text: "unstructured", "row", "matrix", "uniform", or "n:m" (n KEPT).
        sparsity: share to prune; None means 0.5, for "uniform" 0.2, and for n:m whatever follows from it.

    Raises:
        InputError: the pattern is not one, or the sparsity is outside (0, 1) or contradicts it.
    """
    if sparsity is not None and not 0 < sparsity < 1:
        raise InputError(f"sparsity {sparsity:g} is outside (0, 1): give the share to prune, such as 0.5")
    if text == "unstructured":
        return Unstructured(0.5 if sparsity is None else sparsity)
    if text in GROUPS:
        return Unstructured(0.5 if sparsity is None else sparsity, text)
    if text == "uniform":
        return Uniform(0.2 if sparsity is None else sparsity)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise InputError(f"pattern '{text}' is none: use unstructured, row, matrix, uniform, or n:m such as 2:4")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise InputError(f"pattern {n}:{m} keeps {n} of every {m} weights: n must be from 1 to m - 1, as in 2:4")
    pattern = NM(n, m)
    if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        raise InputError(
            f"pattern {pattern} prunes {pattern.sparsity:g} of the weights, but sparsity {sparsity:g} was given: "
            "leave --sparsity out"
        )
    return pattern
