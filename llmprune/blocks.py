"""The decoder blocks of a model and their sites, found from the modules, never from a model's name.

Everything of rank two or more that is not a site is either known to be none (a router, a gate, an embedding, a
convolution) and listed as skipped with the reason, or it is an error that names it: a model is never pruned in
part without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmprune.errors import InputError
from llmprune.sites import Site
from llmprune.unprunable import find_routers, is_matrix, why_not

if TYPE_CHECKING:
    from transformers import PreTrainedModel


IGNORED = "ignored as asked"
UNTARGETED = "not among the targets"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Skipped:
    """A parameter of a block that is not pruned, and why."""

    name: str
    reason: str
    parameters: int


@dataclass(eq=False)
class Block:
    """A decoder block with what can and what cannot be pruned in it."""

    name: str
    module: nn.Module
    sites: list[Site]
    skipped: list[Skipped]

    @property
    def parameters(self) -> int:
        """All parameters of the block, norms and biases included."""
        return sum(p.numel() for p in self.module.parameters())


def find_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder blocks with their dotted names: the module list whose class is in `_no_split_modules`.

    Of several, the longest of those that are as long as the text model's config says: a vision tower has blocks too.

    Raises:
        InputError: there is none, or blocks share parameters.
    """
    classes = set(model._no_split_modules or ())
    lists = [
        [(f"{name}.{i}", block) for i, block in enumerate(modules)]
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList) and len(modules) and type(modules[0]).__name__ in classes
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} shows no list of decoder blocks (classes {sorted(classes) or 'none'}): "
            "only decoder-only causal language models can be pruned"
        )
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    blocks = max([blocks for blocks in lists if len(blocks) == depth] or lists, key=len)
    owner: dict[int, str] = {}
    for name, block in blocks:
        for parameter in block.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise InputError(f"{name} shares weights with {owner[id(parameter)]}: such models are not supported")
    return blocks


def survey(model: PreTrainedModel, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Block]:
    """Find the sites of every block and keep those that the user wants.

    Args:
        targets: patterns of what to prune; empty means everything.
        ignore: patterns of what to leave alone.
            A pattern is a name or any dotted part of one ("down_proj", "model.layers.0", "mlp"), a class name,
            or "re:" and an expression that matches from the beginning of the name.

    Raises:
        InputError: a pattern matches nothing, nothing is left, or a parameter is not understood.
    """
    used: set[str] = set()
    blocks = []
    for name, module in find_blocks(model):
        block = Block(name, module, [], [])
        routers = find_routers(module)
        for path, owner in module.named_modules():
            full = f"{name}.{path}" if path else name
            for key, parameter in owner.named_parameters(recurse=False):
                _place(block, full, owner, key, parameter, routers, targets, ignore, used)
        _check_apart(block.sites)
        blocks.append(block)
    unused = [pattern for pattern in (*targets, *ignore) if pattern not in used]
    if unused:
        example = next((site.name for block in blocks for site in block.sites), "model.layers.0.self_attn.q_proj")
        raise InputError(
            f"'{unused[0]}' matches no parameter of the blocks: give a name or a dotted part of one, a class, or "
            f"re:EXPRESSION (a name looks like {example})"
        )
    if not any(block.sites for block in blocks):
        raise InputError("nothing is left to prune after --targets and --ignore: target more, or ignore less")
    return blocks


def _check_apart(sites: Sequence[Site]) -> None:
    """Raise InputError if two sites of a block are the same weights: they would be pruned for two inputs in turn."""
    first: dict[tuple[int, int | None], Site] = {}
    for site in sites:
        other = first.setdefault((id(site.stored), site.index), site)
        if other is not site:
            raise InputError(f"{site.name} shares its weights with {other.name}: leave both out with --ignore")


def _place(
    block: Block,
    path: str,
    owner: nn.Module,
    key: str,
    parameter: nn.Parameter,
    routers: set[int],
    targets: Sequence[str],
    ignore: Sequence[str],
    used: set[str],
) -> None:
    """Put one parameter among the block's sites or among what is skipped; small vectors are neither."""
    if not is_matrix(key, parameter):
        return
    linear = isinstance(owner, (nn.Linear, Conv1D))
    name = path if linear else f"{path}.{key}"
    ignored = _matches(name, owner, ignore, used)
    targeted = _matches(name, owner, targets, used) or not targets
    reason = why_not(owner, parameter, routers)
    if reason is None and ignored:
        reason = IGNORED
    elif reason is None and not targeted:
        reason = UNTARGETED
    if reason is not None:
        block.skipped.append(Skipped(name, reason, parameter.numel()))
        return
    if parameter.dtype not in FLOATING:
        raise InputError(
            f"{name} is stored as {parameter.dtype}: quantised weights cannot be pruned; prune first, then quantise"
        )
    if linear:
        block.sites.append(Site(name, owner, key, transposed=isinstance(owner, Conv1D)))
    elif parameter.ndim == 3 and hasattr(owner, "is_transposed"):
        transposed = bool(owner.is_transposed)
        block.sites += [Site(f"{name}.{i}", owner, key, i, transposed) for i in range(len(parameter))]
    else:
        raise InputError(
            f"{name} {tuple(parameter.shape)} in {type(owner).__name__} is not understood as a linear map: "
            f"leave it unpruned with --ignore {name}"
        )


def _matches(name: str, owner: nn.Module, patterns: Sequence[str], used: set[str]) -> bool:
    hits = [pattern for pattern in patterns if _hit(name, owner, pattern)]
    used.update(hits)
    return bool(hits)


def _hit(name: str, owner: nn.Module, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"'{pattern}' is no regular expression: {error}") from error
    return f".{pattern}." in f".{name}." or type(owner).__name__ == pattern


def all_sites(blocks: Sequence[Block]) -> Iterator[Site]:
    """Every site of every block, in order."""
    for block in blocks:
        yield from block.sites
