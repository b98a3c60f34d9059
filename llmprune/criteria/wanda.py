"""Wanda: weight magnitude times the size of its input."""

from __future__ import annotations

from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.sites import Site


class Wanda(Criterion):
    """S_ij = |W_ij| sqrt(E[x_j^2]), compared within each output row; no weight moves. arXiv 2306.11695."""

    name = "wanda"
    summary = "|W| times the root mean square of its input"
    source = "Sun et al., arXiv 2306.11695"

    def score(self, site: Site) -> Tensor:
        """[out, in], |W| sqrt(E[x^2])."""
        assert site.statistics is not None
        return site.goal.abs() * site.statistics.energy.sqrt()
