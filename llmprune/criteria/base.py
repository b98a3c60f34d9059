"""What a method is: an expression that scores weights, and optionally a hook that also moves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from llmprune.patterns import NM, Pattern, Unstructured
from llmprune.sites import Site

if TYPE_CHECKING:
    from llmprune.structured.task import LearningOptions, Task

COMPENSATIONS = ("none", "bias", "least-squares")
"""Nothing; the mean of what is pruned moved into the bias; that, and the best weights on the support."""


@dataclass(frozen=True)
class Pruned:
    """The outcome for one site.

    Attributes:
        weight: [out, in] float32, zero where pruned.
        keep: bool [out, in], True = survives.
        bias_shift: [out] float32 to be added to the bias, or None.
        note: what the user should know about this site, or "".
        residual: of the least squares that gave the weight, or None.
    """

    weight: Tensor
    keep: Tensor
    bias_shift: Tensor | None = None
    note: str = ""
    residual: float | None = None


class Criterion(ABC):
    """One pruning method. A subclass in its own file of this folder is found by itself.

    Class attributes:
        name: how users call it.
        summary: one line for the list of methods.
        source: paper or origin.
        needs: statistics of the inputs, among "moments" and "gram"; empty means no calibration data.
        pattern: which zeros it makes unless the user asks for others.
        group: which weights compete under an unstructured pattern: "row" or "matrix".
        compensation: what repairs the output, unless the user asks for another: one of COMPENSATIONS.
        refine, sequential, target, mix, residual: its own choice on these axes, unless the user has another. A
            quarter of the site's own output in a dense target keeps it from following the calibration text alone.
        moves_weights: True if `prune` moves surviving weights.
        learns: True if `prepare` follows the run's LearningOptions and keeps a state to go on from.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"moments"})
    pattern: ClassVar[str] = "unstructured"
    group: ClassVar[str] = "row"
    compensation: str = "none"
    refine: ClassVar[str] = "none"
    sequential: ClassVar[str] = "block"
    target: ClassVar[str] = "own"
    mix: ClassVar[float] = 0.75
    residual: ClassVar[float] = 1.0
    moves_weights: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    def __init__(self, seed: int = 0, compensation: str | None = None) -> None:
        """`seed` matters to methods that draw random numbers; `compensation` replaces the method's own."""
        self.seed = seed
        if compensation is not None:
            self.compensation = compensation

    def check(self, pattern: Pattern) -> None:  # noqa: B027 - a hook that most methods leave alone
        """Raise InputError for a pattern this method cannot do."""

    def prepare(self, task: Task) -> None:  # noqa: B027 - a hook that most methods leave alone
        """Look at the whole model before the walk; only under a uniform pattern."""

    def learning_passes(self, options: LearningOptions) -> float:
        """Forward passes over the calibration windows that `prepare` costs; a backward pass counts as two."""
        return 0.0

    @abstractmethod
    def score(self, site: Site) -> Tensor:
        """[out, in] float32: higher survives."""

    def prune(self, site: Site, pattern: Pattern) -> Pruned:
        """Choose the survivors and, where the method moves the bias, compensate the mean.

        bias_shift = (W_dense - W_new) mean(x), from the dense weights (arXiv 2503.22451), or the target's mean.
        """
        keep = pattern.keep(self.score(site), self.group)
        weight = self.survivors(site).masked_fill(~keep, 0.0)
        if not self.compensates(site):
            return Pruned(weight, keep, note="no bias to move" if self.wants_bias(site) else "")
        return Pruned(weight, keep, site.bias_shift(weight))

    def survivors(self, site: Site) -> Tensor:
        """[out, in] float32: what a weight is if it survives, unless it is solved for."""
        return site.goal

    @property
    def moves_bias(self) -> bool:
        """True if the mean output is repaired through the bias, where the config can carry one."""
        return self.compensation != "none"

    def wants_bias(self, site: Site) -> bool:
        """True if the method would move this site's bias, if it had one."""
        return self.moves_bias

    def compensates(self, site: Site) -> bool:
        """True if this site's bias is moved."""
        return site.bias is not None and self.wants_bias(site)

    def group_name(self, pattern: Pattern) -> str:
        """Which weights compete, in words."""
        if isinstance(pattern, Unstructured):
            return pattern.group or self.group
        return f"group of {pattern.m} inputs" if isinstance(pattern, NM) else "projection, unit against unit"
