"""What is prunable in a decoder block, found from its modules, never from a model's name.

A site is one weight matrix, always seen as [out, in]: an nn.Linear, a Conv1D (stored [in, out]), or one
expert's slice of a fused 3-D parameter. Everything of rank two or more that is not a site is either known
to be none (a router, a gate, an embedding, a convolution) and listed as skipped with the reason, or it is
an error that names it: a model is never pruned in part without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmprune.errors import InputError
from llmprune.inputs import InputStatistics
from llmprune.unprunable import find_routers, is_matrix, why_not

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Target:
    """The linear map that pruning approximates.

    Attributes:
        weight: [out, in] float32.
        mean: [out] float32, of its output over the calibration tokens, the site's present bias left out.
    """

    weight: Tensor
    mean: Tensor


@dataclass(eq=False)
class Site:
    """One prunable weight matrix.

    Attributes:
        name: dotted path of the module (or of the fused parameter, then the expert's number).
        module: the module that owns the parameter.
        parameter: the parameter's name in the module.
        index: the expert's number in a fused 3-D parameter, else None.
        transposed: True if the storage is [in, out].
        statistics: what was seen of the inputs; None before collecting, or without calibration data.
        fed_by_norm: True if the input is the output of a norm of the same block; None if not observed.
        target: what the site is to return instead of its own weights' output; None means that.
        pooled: True if too few tokens came and the statistics are those of all its sibling experts.
    """

    name: str
    module: nn.Module
    parameter: str
    index: int | None = None
    transposed: bool = False
    statistics: InputStatistics | None = None
    fed_by_norm: bool | None = None
    target: Target | None = None
    pooled: bool = False

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight, possibly among other experts' weights."""
        parameter = getattr(self.module, self.parameter)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """[out, in], a view: what is written to it is written to the model."""
        data = self.stored.data
        if self.index is not None:
            data = data[self.index]
        return data.T if self.transposed else data

    @property
    def goal(self) -> Tensor:
        """[out, in] float32: the weights that pruning approximates, the site's own unless it has a target."""
        return self.weight.float() if self.target is None else self.target.weight

    def bias_shift(self, weight: Tensor) -> Tensor:
        """[out] float32: what the bias must gain for `weight` [out, in] to return the wanted mean."""
        assert self.statistics is not None
        if self.target is None:
            return (self.weight.float() - weight) @ self.statistics.mean
        return self.target.mean - weight @ self.statistics.mean

    def forget(self) -> None:
        """Let go of what was measured."""
        self.statistics = self.target = None

    @property
    def bias(self) -> Tensor | None:
        """[out], a view of the bias that is added to this site's output, or None."""
        name = "bias" if self.index is None else f"{self.parameter}_bias"
        bias = getattr(self.module, name, None)
        if not isinstance(bias, nn.Parameter):
            return None
        return bias.data if self.index is None else bias.data[self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        shape = self.stored.shape[-2:]
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])

    @property
    def role(self) -> str:
        """The last part of the name that is no number: q_proj, c_fc, down_proj."""
        return [part for part in self.name.split(".") if not part.isdigit()][-1]

    @property
    def family(self) -> str:
        """The name with numbers starred: experts of one block that play the same part share it."""
        return re.sub(r"\.\d+(?=\.|$)", ".*", self.name)

    def write_(self, weight: Tensor, keep: Tensor, bias_shift: Tensor | None = None) -> None:
        """Store the pruned weight [out, in] (True in `keep` [out, in] survives) and move the bias [out].

        Casts to the stored dtype once. No negative zero is left behind: packed 2:4 formats and bitwise
        comparisons would take it for a weight.
        """
        target = self.weight
        target.copy_(weight.masked_fill(~keep, 0.0))
        target.masked_fill_(target == 0, 0.0)
        if bias_shift is not None:
            bias = self.bias
            assert bias is not None, f"{self.name} has no bias to move"
            bias.copy_(bias.float() + bias_shift)


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
    blocks = max(lists, key=len)
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
        reason = "ignored as asked"
    elif reason is None and not targeted:
        reason = "not among the targets"
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
