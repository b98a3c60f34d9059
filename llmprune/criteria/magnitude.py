"""Magnitude pruning: the oldest criterion, without data."""

from __future__ import annotations

from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.sites import Site


class Magnitude(Criterion):
    """S = |W|. By default all weights of a matrix compete."""

    name = "magnitude"
    summary = "|W|, no data"
    source = "Han et al., arXiv 1506.02626"
    needs = frozenset()
    group = "matrix"

    def score(self, site: Site) -> Tensor:
        """[out, in], |W|."""
        return site.goal.abs()
