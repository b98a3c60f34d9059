"""What a run will touch and what it needs, known before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune_eval.loading import is_packed
from llmprune_eval.windows import window_length
from torch import Tensor

from llmprune.blocks import Block, Skipped, all_sites, survey
from llmprune.config import PruneConfig
from llmprune.errors import InputError
from llmprune.patterns import Columns, RunPattern, Uniform
from llmprune.recipe import Recipe
from llmprune.structured.layout import check_alike
from llmprune.structured.structure import Structure, make_structure
from llmprune.structured.widths import can_narrow

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WEIGHTS, HIDDEN, BLOCK = "weights", "hidden states", "largest block on the device"
DENSE = "dense values of one block, at most"
LEARNING = "learning: activations and logits of a batch, beside all weights"
ON_HOST = frozenset({WEIGHTS, HIDDEN, DENSE})
"""What a Plan's memory counts that waits on the CPU where the block at work computes on another device."""


@dataclass(frozen=True)
class Plan:
    """The blocks with their sites, and the run's needs.

    Attributes:
        pattern: asked for, with its sparsity of the sites or of the decoder.
        blocks: every decoder block, with the sites to prune and what is skipped.
        decoder_parameters: all parameters of the blocks.
        model_parameters: all parameters of the model, tied ones once.
        site_parameters: weights at the sites.
        seqlen: tokens per calibration window.
        passes: forward passes through the decoder that calibration costs, at most.
        memory: bytes, by what they are for.
        structure: with a uniform pattern, the units and how many stay; None if they were not looked for.
    """

    pattern: RunPattern
    blocks: list[Block]
    decoder_parameters: int
    model_parameters: int
    site_parameters: int
    seqlen: int
    passes: float
    memory: dict[str, int]
    structure: Structure | None = None

    @property
    def removed(self) -> float:
        """Share of the decoder's parameters that will be pruned; where units were not looked for, the share asked."""
        if self.structure is not None:
            return self.structure.removed * len(self.blocks) / self.decoder_parameters
        return self.pattern.sparsity * (1 if isinstance(self.pattern, Uniform) else self.share)

    @property
    def share(self) -> float:
        """Share of the decoder's parameters that lie at sites."""
        return self.site_parameters / self.decoder_parameters

    @property
    def host_memory(self) -> int:
        """Bytes, where the block at work computes on another device."""
        return sum(size for what, size in self.memory.items() if what in ON_HOST)

    @property
    def device_memory(self) -> int:
        """Bytes on that device, in the walk or before it, where masks are learned on the whole model."""
        walk = sum(size for what, size in self.memory.items() if what not in ON_HOST | {LEARNING})
        return max(walk, self.memory[WEIGHTS] + self.memory[LEARNING]) if LEARNING in self.memory else walk

    @property
    def cpu_memory(self) -> int:
        """Bytes, where the CPU does everything: its block at work is one of the weights."""
        return sum(size for what, size in self.memory.items() if what != BLOCK)

    @property
    def skipped(self) -> list[Skipped]:
        """What is not pruned, over all blocks."""
        return [skipped for block in self.blocks for skipped in block.skipped]


def make_plan(model: PreTrainedModel, config: PruneConfig, *, probe: bool = True, possible: bool = False) -> Plan:
    """Survey a model (on any device, also meta) and check that the pattern fits every site.

    Args:
        probe: False leaves the units of a uniform pattern unsought, which takes one real block in float32. Memory is
            then that of every site but the experts, which is too much.
        possible: True if the pattern is known to be possible, from a plan of another method: what takes seconds to
            find out about the config is not found out again.

    Raises:
        InputError: as `survey`, or a width that the pattern does not divide, or too long windows, or a packed model.
    """
    if is_packed(model.config):
        raise InputError(
            "the model is packed, which cannot be pruned: run `llmprune unpack FOLDER -o OUT`, and take OUT"
        )
    blocks = survey(model, config.targets, config.ignore)
    recipe = config.make_recipe()
    structure = None
    if isinstance(recipe.pattern, Uniform) and not probe:
        if not possible:
            _check_config(model, blocks)
        _check_share(blocks, recipe.pattern.sparsity)
    elif isinstance(recipe.pattern, Uniform):
        structure = make_structure(
            model,
            blocks,
            recipe.pattern.sparsity,
            moves_bias=recipe.criterion.moves_bias,
            keep_heads=config.keep_heads,
            round_channels=config.round_channels,
        )
    sites = list(all_sites(blocks))
    for site in sites:
        recipe.pattern.check(site.name, site.shape[1])
        if min(site.shape) == 0:
            raise InputError(f"{site.name} is empty {site.shape}: leave it out with --ignore {site.name}")
    seqlen = window_length(model, config.max_seq_length)
    data = bool(recipe.needs) or config.dataset is not None
    return Plan(
        pattern=recipe.pattern,
        blocks=blocks,
        decoder_parameters=sum(block.parameters for block in blocks),
        model_parameters=sum(p.numel() for p in model.parameters()),
        site_parameters=sum(site.shape[0] * site.shape[1] for site in sites),
        seqlen=seqlen,
        passes=_passes(recipe, config, len(blocks)) if data else 0.0,
        memory=_memory(model, blocks, config, seqlen, recipe, data),
        structure=structure,
    )


def _check_config(model: PreTrainedModel, blocks: list[Block]) -> None:
    """What can be said about units without looking for them, from the config.

    Raises:
        InputError: the blocks differ, or the config cannot say that they are narrower.
    """
    check_alike(model)
    if all(site.index is None for site in all_sites(blocks)) and not can_narrow(model):
        raise InputError(
            f"no entry of the config of {type(model).__name__} says that there are fewer channels: "
            "--pattern uniform --dry-run tells whether heads can go"
        )


def _check_share(blocks: list[Block], sparsity: float) -> None:
    """Leaves the sites that can have units.

    Raises:
        InputError: too little lies outside the experts, which are left alone.
    """
    for block in blocks:
        block.sites = [site for site in block.sites if site.index is None]
    goal = sparsity * sum(block.parameters for block in blocks)
    there = sum(site.shape[0] * site.shape[1] for site in all_sites(blocks))
    if there < goal:
        raise InputError(
            f"{goal:,.0f} parameters of the decoder are to go, and only {there:,} lie outside its experts, which are "
            "left alone: ask for a smaller sparsity"
        )


def _passes(recipe: Recipe, config: PruneConfig, blocks: int) -> float:
    """Of the last block nothing is wanted but its statistics, where that is a pass of its own."""
    walk = (1.0 if recipe.sequential == "site" else 2 - 1 / blocks) + (recipe.target == "dense")
    return walk + recipe.criterion.learning_passes(config.learning)


def _activations(model: PreTrainedModel, blocks: list[Block], config: PruneConfig, seqlen: int) -> int:
    """Bytes: what enters and leaves every matrix, and the logits of both models with their float32 logarithms."""
    item, tokens = next(model.parameters()).element_size(), config.batch_size * seqlen
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    vocabulary, hidden_size = embedding.shape
    inside = [sum(sum(p.shape) for p in block.module.parameters() if p.ndim == 2) for block in blocks]
    width = len(blocks) * hidden_size + max(inside) if config.learning.checkpointing else sum(inside)
    return tokens * (width * item + vocabulary * (2 * item + 16))


def _pairs(blocks: list[Block]) -> int:
    """Bytes of the Gram matrices by which KV groups are ordered before anything is learned."""
    patterns = [(site.pattern, site.shape[1]) for site in all_sites(blocks)]
    return sum(4 * width**2 for pattern, width in patterns if isinstance(pattern, Columns) and pattern.size > 1)


def _memory(
    model: PreTrainedModel, blocks: list[Block], config: PruneConfig, seqlen: int, recipe: Recipe, data: bool
) -> dict[str, int]:
    """Estimates in bytes; statistics and dense values as if no two sites shared an input."""
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    item = next(model.parameters()).element_size()
    shapes = [[site.shape for site in block.sites] for block in blocks]
    tokens = config.num_calibration_samples * seqlen if data else 0
    dense, needs = recipe.target == "dense", recipe.needs
    memory = {
        WEIGHTS: sum(p.numel() * p.element_size() for p in model.parameters()),
        HIDDEN: tokens * hidden_size * item * (2 if dense else 1),
        BLOCK: max(sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in blocks),
        "statistics of one block, at most": max(
            sum(4 * i * (2 if needs <= {"moments"} else i) + 4 * o * i * dense for o, i in block) if needs else 0
            for block in shapes
        ),
        "largest site in float32, three copies": max(12 * site.shape[0] * site.shape[1] for site in all_sites(blocks)),
    }
    if dense:
        memory[DENSE] = max(tokens * item * (hidden_size + sum(min(shape) for shape in block)) for block in shapes)
    if recipe.sequential == "site":
        memory["micro-batches that wait on the device"] = max(
            tokens * item * (2 * hidden_size + max((i for _, i in block), default=0)) for block in shapes
        )
    if recipe.criterion.learning_passes(config.learning):
        memory[LEARNING] = max(_activations(model, blocks, config, seqlen), _pairs(blocks) * recipe.criterion.learns)
    return memory


def plan_as_dict(plan: Plan, config: PruneConfig) -> dict[str, Any]:
    """For --dry-run --json."""
    return {
        "config": config.as_dict(),
        "decoder_parameters": plan.decoder_parameters,
        "model_parameters": plan.model_parameters,
        "site_parameters": plan.site_parameters,
        "share_of_decoder_at_sites": plan.share,
        "share_of_decoder_pruned": plan.removed,
        "widths": None if plan.structure is None else plan.structure.describe(),
        "passes": plan.passes,
        "memory_bytes": plan.memory,
        "seqlen": plan.seqlen,
        "sites": [{"name": site.name, "shape": list(site.shape)} for site in all_sites(plan.blocks)],
        "skipped": [{"name": s.name, "reason": s.reason, "parameters": s.parameters} for s in plan.skipped],
    }
