"""MaskPrune (our reconstruction): which units go is learned by a minimax game on gates, against the dense model."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.errors import InputError
from llmprune.patterns import Columns, Pattern, Uniform
from llmprune.sites import Site
from llmprune.structured.adapters import Adapters
from llmprune.structured.distillation import Distillation
from llmprune.structured.gates import Gates, checkpointed, frozen
from llmprune.structured.learning import CHECKS, learn_gates
from llmprune.structured.minimax import CHOOSE
from llmprune.structured.task import LearningOptions, Task


class MaskPrune(Criterion):
    """Gates on all units are learned together, at the same width in every block; the survivors' are folded in.

    A unit's score is the size of its gate. After arXiv 2502.14008, whose equations were not read.
    """

    name = "maskprune"
    summary = "learned masks on units, one width for all layers (our reconstruction)"
    source = "after arXiv 2502.14008"
    pattern = "uniform"
    moves_weights = True
    learns = True

    def __init__(self, seed: int = 0, compensation: str | None = None) -> None:
        """As for every method."""
        super().__init__(seed, compensation)
        self._gates: Gates | None = None

    def check(self, pattern: Pattern) -> None:
        """Whole units only."""
        if not isinstance(pattern, Uniform):
            raise InputError(f"maskprune learns which units go, and pattern {pattern} is about weights: use "
                             "--pattern uniform, or another method")  # fmt: skip

    def prepare(self, task: Task) -> None:
        """Learn the gates, and with the schedule "paper" the widths."""
        with frozen(task.model, task.device) as device:
            gates = Gates(task.blocks, device)
            options = task.options
            adapters = Adapters(task.model, options.lora_rank, task.seed) if options.lora_rank else None
            loss = Distillation(task.model, gates, options.kl, options.ce, options.hidden, adapters)
            with checkpointed(task.blocks) if options.checkpointing else nullcontext():
                game = learn_gates(task, gates, loss, adapters)
            if adapters is not None:
                adapters.merge_()
        if game.keeps != gates.keeps:
            task.structure.widen_(task.structure.fit({k: 1 - share for k, share in game.removed.items()}), task.blocks)
        self._gates = gates

    def learning_passes(self, options: LearningOptions) -> float:
        """Dense forward, gated forward and back for every window seen; both forward where states are compared."""
        return 4.0 * options.passes + 2 * CHECKS * (1 - CHOOSE)

    def score(self, site: Site) -> Tensor:
        """[out, in], the same for all weights of a unit."""
        return self._columns(site).abs().expand(site.shape)

    def survivors(self, site: Site) -> Tensor:
        """The gates are folded in."""
        return site.goal * self._columns(site)

    def _columns(self, site: Site) -> Tensor:
        """[in], the gate of every column."""
        assert self._gates is not None and isinstance(site.pattern, Columns)
        return self._gates.of_site(site.name).to(site.weight.device).repeat_interleave(site.pattern.size)
