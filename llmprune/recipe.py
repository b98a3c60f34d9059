"""What is done to one site: a criterion chooses, refinement exchanges, compensation moves what survives.

The three are independent: any criterion's mask can be refined, and any mask compensated.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.criteria import Criterion, Pruned
from llmprune.errors import InputError
from llmprune.least_squares import TOLERANCE, least_squares
from llmprune.patterns import Pattern
from llmprune.sites import Site
from llmprune.swaps import swap

REFINEMENTS = ("none", "swap")


@dataclass(frozen=True)
class Recipe:
    """How every site is pruned.

    Attributes:
        criterion: chooses the mask; its `compensation` is one of COMPENSATIONS.
        pattern: how many survive, and among which.
        refine: one of REFINEMENTS.
    """

    criterion: Criterion
    pattern: Pattern
    refine: str

    def check(self) -> None:
        """Raise InputError for parts that do not fit together."""
        self.criterion.check(self.pattern)
        if self.refine != "none" and self.criterion.moves_weights and self.criterion.compensation != "least-squares":
            raise InputError(
                f"the weights that {self.criterion.name} moves fit its own mask, not a refined one: add "
                "--compensation least-squares, or leave --refine out"
            )

    @property
    def solves(self) -> bool:
        """True if the surviving weights are solved for."""
        return self.criterion.compensation == "least-squares"

    @property
    def needs(self) -> frozenset[str]:
        """Statistics to gather: the pairs of features include the single ones."""
        needs, moves_bias = self.criterion.needs, self.criterion.moves_bias
        if self.solves or self.refine != "none" or "gram" in needs:
            return frozenset({"covariance" if moves_bias else "gram"})
        return needs | {"moments"} if moves_bias else needs

    def prune(self, site: Site) -> Pruned:
        """Choose, refine, compensate."""
        pruned = self.criterion.prune(site, self.pattern)
        if self.refine == "none" and not self.solves:
            return pruned
        assert site.statistics is not None and site.statistics.gram is not None
        centred = self.criterion.compensates(site)
        H = site.statistics.gram.damped(centred=centred)
        dense, keep = site.weight.float(), pruned.keep
        if self.refine == "swap":
            keep = swap(H, dense, keep, self.pattern)
        notes = ["no bias to move"] * (self.criterion.wants_bias(site) and not centred)
        weight, residual = dense.masked_fill(~keep, 0.0), None
        if self.solves:
            weight, residual = least_squares(H, dense, keep)
            notes += [f"least squares stopped at a residual of {residual:.1g}"] * (residual > TOLERANCE)
        shift = (dense - weight) @ site.statistics.mean if centred else None
        return Pruned(weight, keep, shift, "; ".join(notes), residual)
