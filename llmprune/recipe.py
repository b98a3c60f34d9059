"""What is done to one site: it gets a target, a criterion chooses, refinement exchanges, compensation moves.

These are independent: any criterion's mask can be refined, any mask compensated, for either target and in
either order of the sites.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.criteria import Criterion, Pruned
from llmprune.errors import InputError
from llmprune.least_squares import TOLERANCE, least_squares
from llmprune.patterns import RunPattern, Uniform
from llmprune.sites import Site
from llmprune.swaps import swap
from llmprune.targets import dense_target

REFINEMENTS = ("none", "swap")


@dataclass(frozen=True)
class Recipe:
    """How every site is pruned.

    Attributes:
        criterion: chooses the mask; its `compensation` is one of COMPENSATIONS.
        pattern: how many survive, and among which.
        refine: one of REFINEMENTS.
        sequential: in which of the orders, "block" or "site", the sites of a block are measured and pruned.
        target: one of TARGETS.
        mix: in [0, 1], how much of a dense target is the dense model's; the rest is the site's own output.
        residual: in [0, 1], how much of the residual stream's error a dense target carries.
    """

    criterion: Criterion
    pattern: RunPattern
    refine: str = "none"
    sequential: str = "block"
    target: str = "own"
    mix: float = Criterion.mix
    residual: float = Criterion.residual

    def check(self) -> None:
        """Raise InputError for parts that do not fit together."""
        for name in ("mix", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a number from 0 to 1")
        self.criterion.check(self.pattern)
        if self.refine != "none" and isinstance(self.pattern, Uniform):
            raise InputError("swaps exchange single weights, and pattern uniform prunes whole units: use --refine none")
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
        pairs = frozenset({"covariance" if moves_bias else "gram"})
        if self.target == "dense":
            return pairs | {"cross"}
        if self.solves or self.refine != "none" or "gram" in needs:
            return pairs
        return needs | {"moments"} if moves_bias else needs

    def prune(self, site: Site) -> Pruned:
        """Aim, choose, refine, compensate."""
        centred = self.criterion.compensates(site)
        notes = self._aim(site, centred)
        pattern = site.pattern or self.pattern
        pruned = self.criterion.prune(site, pattern)
        if self.refine == "none" and not self.solves:
            return replace(pruned, note="; ".join([*notes, *[pruned.note] * bool(pruned.note)]))
        assert site.statistics is not None and site.statistics.gram is not None
        H = site.statistics.gram.damped(site.statistics.gram.ridge, centred)
        goal, keep = site.goal, pruned.keep
        if self.refine == "swap":
            keep = swap(H, goal, keep, pattern)
        notes += ["no bias to move"] * (self.criterion.wants_bias(site) and not centred)
        weight, residual = goal.masked_fill(~keep, 0.0), None
        if self.solves:
            weight, residual = least_squares(H, goal, keep)
            notes += [f"least squares stopped at a residual of {residual:.1g}"] * (residual > TOLERANCE)
        shift = site.bias_shift(weight) if centred else None
        return Pruned(weight, keep, shift, "; ".join(notes), residual)

    def _aim(self, site: Site, centred: bool) -> list[str]:
        """Give the site its target; returns what there is to say about it."""
        if self.target == "own":
            return []
        assert site.statistics is not None and site.statistics.gram is not None
        if site.statistics.cross is None:
            return ["own target: other tokens are routed here than in the dense model"]
        site.target, damping = dense_target(site, centred, self.mix)
        return [f"damping {damping:g}"] * (damping != site.statistics.gram.ridge)
