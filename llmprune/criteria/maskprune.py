"""MaskPrune (our reconstruction): which units go is learned by a minimax game on gates, against the dense model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.criteria.base import Criterion
from llmprune.criteria.obs import removal_steps
from llmprune.errors import InputError
from llmprune.gram import Gram
from llmprune.patterns import Columns, Pattern, Uniform
from llmprune.sites import Site
from llmprune.structured.adapters import Adapters
from llmprune.structured.distillation import Distillation
from llmprune.structured.gates import Gates, checkpointed, frozen, own_batches
from llmprune.structured.learning import CHECKS, learn_gates
from llmprune.structured.minimax import CHOOSE
from llmprune.structured.task import LearningOptions, Task
from llmprune.wiring import first_of


class MaskPrune(Criterion):
    """Gates on all units are learned together, at the same width in every block; the survivors' are folded in.

    A unit's score is the size of its gate; which KV groups go, `obs` says beforehand. After arXiv 2502.14008, whose
    equations were not read.
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
                game = learn_gates(task, gates, loss, _order_of_groups(task, gates), adapters)
            if adapters is not None:
                adapters.merge_()
        if game.keeps != gates.keeps:
            task.structure.widen_(task.structure.fit({k: 1 - share for k, share in game.removed.items()}), task.blocks)
        self._gates = gates

    def learning_passes(self, options: LearningOptions) -> float:
        """Dense forward, gated forward and back for every window seen; both forward where states are compared.

        And one for the order of the groups.
        """
        return 4.0 * options.passes + 2 * CHECKS * (1 - CHOOSE) + 1

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


@torch.no_grad()
def _order_of_groups(task: Task, gates: Gates) -> dict[str, Tensor]:
    """[blocks, units] for units of several columns (KV groups): at which step `obs` removes each from the dense model.

    A block has few of them, and the others make up for much of what one does. Gates do not show that: by these, the
    noise of a moment decided which groups stayed.
    """
    order = {path: value.clone() for path, value in gates.values.items() if gates.sizes[path] > 1}
    grams = {
        path: [Gram(value.shape[1] * gates.sizes[path], value.device) for _ in task.blocks]
        for path, value in order.items()
    }
    with ExitStack() as stack:
        for path, of_blocks in grams.items():
            for block, gram in zip(task.blocks, of_blocks, strict=True):
                module = block.module.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(_watching(gram), with_kwargs=True).remove)
        for batch, _ in own_batches(task.windows, task.batch_size) if order else ():
            task.model(input_ids=batch.to(task.model.device), use_cache=False)
    for path, of_blocks in grams.items():
        for index, (block, gram) in enumerate(zip(task.blocks, of_blocks, strict=True)):
            gram.all_reduce_()
            (site,) = (site for site in block.sites if site.name == f"{block.name}.{path}")
            order[path][index] = removal_steps(site.goal, gram, gates.sizes[path])
    return order


def _watching(gram: Gram) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gram.update(first_of(args, kwargs).flatten(0, -2).float())

    return before
