"""STADE: if the bias may move, removing a weight costs its share of the input's variance, not of its energy."""

from __future__ import annotations

from torch import Tensor

from llmprune.criteria.wanda import Wanda
from llmprune.sites import Site


class Stade(Wanda):
    """S_ij = W_ij^2 Var(x_j) and b_i += sum over the pruned j of W_ij E[x_j]. arXiv 2503.22451.

    A site whose bias no config can carry is scored as Wanda does: the variance score without its bias is
    worse than either.
    """

    name = "stade"
    summary = "W^2 times the variance of its input, the mean moved into the bias"
    source = "Diego Coello de Portugal Mecke et al., arXiv 2503.22451"
    compensation = "bias"

    def score(self, site: Site) -> Tensor:
        """[out, in], W^2 Var(x) where the bias moves, Wanda's score elsewhere."""
        if not self.compensates(site):
            return super().score(site)
        assert site.statistics is not None
        return site.goal.square() * site.statistics.variance
