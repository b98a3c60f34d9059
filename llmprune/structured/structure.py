"""What a uniform pattern makes of a model: which projections lose how many columns, and the smaller model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.biases import with_biases
from llmprune.blocks import IGNORED, UNTARGETED, Block, Skipped, find_blocks
from llmprune.errors import InputError
from llmprune.patterns import Columns
from llmprune.sites import Site
from llmprune.structured.layout import Kind, Layout, find_layout
from llmprune.structured.surgery import shrunk
from llmprune.structured.widths import Widths, choose_widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Structure:
    """The units of a model and how many of them stay.

    The walk sees the output projections alone: a unit is pruned by clearing its columns there, which is the same
    function as a model without it.

    Attributes:
        layout: what the units are.
        widths: how many stay.
        removed: parameters that one block loses, less those of biases that it is given.
        fit: shares of the units that a block is to keep -> widths as near to them as the parameters allow.
    """

    layout: Layout
    widths: Widths
    removed: int
    fit: Callable[[Mapping[str, float]], Widths]

    @property
    def kinds(self) -> list[Kind]:
        """Those that lose units, or could."""
        return [kind for kind in self.layout.kinds if kind.site in self.widths.kept]

    def widen_(self, widths: Widths, blocks: Sequence[Block]) -> None:
        """Take other widths, before anything is pruned."""
        self.removed += widths.removed - self.widths.removed
        self.widths = widths
        for block in blocks:
            projections = _projections(block)
            for kind in self.kinds:
                projections[kind.site].pattern = Columns(kind.columns, widths.kept[kind.site])

    def cut(self, model: PreTrainedModel, blocks: Sequence[Block]) -> PreTrainedModel:
        """The smaller model, after the walk has cleared the columns of what goes.

        Raises:
            RuntimeError: it does not compute what the given one does.
        """
        units = [{site: _kept(projection) for site, projection in _projections(block).items()} for block in blocks]
        return shrunk(model, find_layout(model), units)  # as it is now: compensation may have given it biases

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        rows = [
            {"projection": kind.site, "units": kind.label, "before": kind.units, "after": self.widths.kept[kind.site],
             "columns_each": kind.columns, "parameters_each": kind.parameters}
            for kind in self.kinds
        ]  # fmt: skip
        return {**asdict(self.widths), "kinds": rows}


def make_structure(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    sparsity: float,
    *,
    moves_bias: bool = False,
    keep_heads: bool = False,
    round_channels: int = 1,
) -> Structure:
    """Find the units, choose the widths, and leave the blocks with the projections that lose columns.

    Args:
        blocks: of `model`, with the sites that the user wants pruned; changed in place.
        sparsity: share of the parameters of the blocks that goes, in (0, 1).
        moves_bias: the projections will be given biases where the config can announce them, which count.

    Raises:
        InputError: as `find_layout` and `choose_widths`, or a projection is left out in some blocks only.
    """
    layout = find_layout(model)
    ignored = [kind.site for kind in layout.kinds if not _is_wanted(kind, blocks)]
    goal, subject = (1 - sparsity) * blocks[0].parameters, model
    choose = partial(choose_widths, ignored=ignored, keep_heads=keep_heads, round_channels=round_channels)
    if moves_bias:
        paths = choose(model, layout, goal).kept  # what is left alone is given no bias
        moved = [site for block in blocks for path, site in _projections(block).items() if path in paths]
        subject = with_biases(model, moved)
        layout = find_layout(subject)
    fit = partial(choose, subject, layout, goal)
    widths = fit()
    left = sum(p.numel() for p in find_blocks(subject)[0][1].parameters()) - widths.removed
    structure = Structure(layout, widths, blocks[0].parameters - left, lambda shares: fit(shares=shares))
    cut = {cut.name for kind in structure.kinds for cut in kind.cuts}
    for block in blocks:
        projections = _projections(block)
        for path, site in projections.items():
            if f"{path}.{site.parameter}" not in cut:
                block.skipped.append(Skipped(site.name, "not part of a unit that is cut", site.weight.numel()))
        block.sites = [projections[kind.site] for kind in structure.kinds]
    structure.widen_(widths, blocks)
    return structure


def _is_wanted(kind: Kind, blocks: Sequence[Block]) -> bool:
    wanted = [_is_whole(kind, block) for block in blocks]
    if any(wanted) and not all(wanted):
        raise InputError(
            f"{blocks[wanted.index(False)].name}.{kind.site} is left out and {blocks[wanted.index(True)].name}."
            f"{kind.site} is not: equal widths need the same choice in every block"
        )
    return all(wanted)


def _is_whole(kind: Kind, block: Block) -> bool:
    """True if its output projection is to be pruned, and nothing that would be cut with it is to be left alone."""
    ignored = {skipped.name for skipped in block.skipped if skipped.reason in (IGNORED, UNTARGETED)}
    touched = {f"{block.name}.{name}" for cut in kind.cuts for name in (cut.name, cut.name.rpartition(".")[0])}
    return kind.site in _projections(block) and not ignored & touched


def _projections(block: Block) -> dict[str, Site]:
    return {site.name.removeprefix(f"{block.name}."): site for site in block.sites}


def _kept(site: Site) -> Tensor:
    """The units whose columns live, long [kept]; if too few do, cleared ones are added: they change nothing."""
    pattern = site.pattern
    assert isinstance(pattern, Columns)
    alive = (site.weight != 0).any(0).view(-1, pattern.size).any(1)
    order = torch.argsort(alive.int(), descending=True, stable=True)
    return order[: pattern.kept].sort().values
