"""RIA: a weight's importance relative to its row and its column, times its input."""

from __future__ import annotations

from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.sites import Site

EPSILON = 1e-12


class Ria(Criterion):
    """S_ij = (|W_ij| / sum_i' |W_i'j| + |W_ij| / sum_j' |W_ij'|) E[x_j^2]^(1/4). Plug-and-Play, ICLR 2024."""

    name = "ria"
    summary = "relative importance in row and column, times the root of the input's size"
    source = "Zhang et al., Plug-and-Play, ICLR 2024"
    group = "matrix"

    def score(self, site: Site) -> Tensor:
        """[out, in]; an empty row or column counts as sum 1e-12."""
        assert site.statistics is not None
        size = site.goal.abs()
        relative = size / (size.sum(0, keepdim=True) + EPSILON) + size / (size.sum(1, keepdim=True) + EPSILON)
        return relative * site.statistics.energy.pow(0.25)
