"""What can be cut out of a decoder block, and which parts of its parameters go with it.

A unit is a set of inputs of an output projection together with everything that feeds these alone: a key/value
head with its query heads, an FFN channel. No architecture is named here. One small block is filled with random
weights, and gradients say which entries of its parameters reach which inputs, so that fused, interleaved and
transposed storage all look alike; where a norm or a mixture ties all inputs together, there is nothing to cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from llmprune.blocks import find_blocks, survey
from llmprune.errors import InputError
from llmprune.stream import Stream
from llmprune.wiring import first_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PretrainedConfig


TOKENS = 32
"""At least so many go through the probe, so that no unit is silent on all of them."""
UNBUILDABLE = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ZeroDivisionError, AssertionError,
    StrictDataclassError,
)  # fmt: skip
"""What the classes of configs and models raise about sizes that they do not accept."""


@dataclass(frozen=True)
class Cut:
    """Entry i along `axis` of the parameter `name` of a block belongs to unit `unit[i]`; unit is long [size]."""

    name: str
    axis: int
    unit: Tensor

    def kept(self, units: Tensor) -> Tensor:
        """The entries that belong to the units [kept], in their order in the parameter."""
        return torch.isin(self.unit, units.to(self.unit.device)).nonzero().flatten()


@dataclass(frozen=True)
class Kind:
    """The units that feed one output projection.

    Attributes:
        site: path of that projection within its block.
        units: how many there are.
        columns: how many of the projection's inputs belong to each, side by side.
        parameters: freed in one block by removing one unit.
        cuts: of every parameter that has to be cut, the projection's weight last.
    """

    site: str
    units: int
    columns: int
    parameters: int
    cuts: tuple[Cut, ...]

    @property
    def label(self) -> str:
        """What its units are called."""
        return "channels" if self.columns == 1 else "KV groups"


@dataclass(frozen=True)
class Layout:
    """The kinds of units of a model, the same in every block.

    Attributes:
        kinds: in the order in which a block computes them.
        tied: output projections whose inputs cannot be taken apart.
    """

    kinds: tuple[Kind, ...]
    tied: tuple[str, ...]


def find_layout(model: PreTrainedModel) -> Layout:
    """The units of a model's blocks; needs its config alone, so that the model may be on the meta device.

    Raises:
        InputError: its blocks differ in shape, or cannot be probed.
    """
    check_alike(model)
    probe = _Probe(model)
    kinds, tied = [], []
    for site, x in probe.inputs_of_projections():
        kind = probe.kind_of(site, x)
        if kind is None:
            tied.append(site)
        else:
            kinds.append(kind)
    return Layout(tuple(kinds), tuple(tied))


def check_alike(model: PreTrainedModel) -> None:
    """Raise InputError unless all blocks have parameters of the same names and shapes."""
    blocks = find_blocks(model)
    first = {name: parameter.shape for name, parameter in blocks[0][1].named_parameters()}
    for path, block in blocks[1:]:
        other = {name: parameter.shape for name, parameter in block.named_parameters()}
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise InputError(
                    f"{path}.{name} is not as in {blocks[0][0]}: equal widths for all blocks need blocks that are alike"
                )


class _Probe:
    """One block with random weights, and what one pass through it has shown."""

    def __init__(self, model: PreTrainedModel) -> None:
        shallow = _shallow(model)
        (path, block), *_ = find_blocks(shallow)
        self._block = block
        self._sites = {site.name.removeprefix(f"{path}."): site for site in survey(shallow)[0].sites}
        text = shallow.config.get_text_config(decoder=True)
        length = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
        rows = -(-TOKENS // length)
        stream = Stream(shallow, [block], torch.arange(rows * length).view(rows, length) % text.vocab_size, rows)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                centre = float(parameter.ndim == 1 and name.endswith("weight"))  # of a norm
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + centre)
        self._hidden = torch.randn(stream.hidden[0].shape, generator=generator).requires_grad_()
        stream.hidden[0] = self._hidden
        self._weights = torch.rand(rows * length, 1, generator=generator) + 0.5  # that no sum over tokens cancels
        self._inputs: list[tuple[str, Tensor]] = []
        with self._parted():
            stream.run(0, 0)

    @contextmanager
    def _parted(self) -> Iterator[None]:
        """Note what arrives at every site and hand it on as a constant, so that gradients end at the sites before."""
        with ExitStack() as stack:
            for name, site in self._sites.items():
                if site.index is None:
                    stack.callback(site.module.register_forward_pre_hook(self._noting(name), with_kwargs=True).remove)
            yield

    def _noting(self, name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = first_of(args, kwargs)
            self._inputs.append((name, x))
            constant = x.detach()
            return ((constant, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): constant})

        return before

    def inputs_of_projections(self) -> list[tuple[str, Tensor]]:
        """The sites, with their inputs [..., in], that receive nothing but what sites before them have made."""
        found: list[tuple[str, Tensor]] = []
        for name, x in self._inputs:
            if x.requires_grad:
                (direct,) = torch.autograd.grad(x.sum(), self._hidden, retain_graph=True, allow_unused=True)
                if direct is None:
                    found.append((name, x))
        return found

    def kind_of(self, name: str, x: Tensor) -> Kind | None:
        """The smallest units of the inputs x of a site, or None if all hang together."""
        width = x.shape[-1]
        for columns in (size for size in range(1, width) if width % size == 0):
            cuts = self._cuts(name, x, columns)
            if cuts is not None:
                return self._kind(name, width // columns, columns, cuts)
        return None

    def _cuts(self, name: str, x: Tensor, columns: int) -> list[Cut] | None:
        """The cuts for units of so many inputs; None if some weight of a site feeds several of them.

        Units are told apart by the bits of their numbers: for every bit, what those with a 1 depend on, and what
        those with a 0. What depends on both is shared.
        """
        unit = torch.arange(x.shape[-1]) // columns
        weights = {f"{path}.{s.parameter}": s for path, s in self._sites.items() if s.index is None}
        numbers: dict[tuple[str, int], Tensor] = {}
        for bit in range(int(unit[-1]).bit_length()):
            ones, zeros = (self._reach(x, (unit >> bit & 1) == value) for value in (1, 0))
            if bit == 0:
                numbers = {key: torch.zeros(len(one), dtype=torch.long) for key, one in ones.items()}
            for key in list(numbers):
                if bool((ones[key] == zeros[key]).any()):  # both, or neither
                    del numbers[key]
                else:
                    numbers[key] += ones[key].long() << bit
            if any((key, int(site.transposed)) not in numbers for key, site in weights.items() if (key, 0) in ones):
                return None
        cuts = [Cut(*key, number) for key, number in numbers.items() if len(number.unique()) > 1]
        # A bias goes with its weight's rows. Its own gradient can vanish: a key's bias may not change attention.
        rows = {cut.name: cut.unit for cut in cuts if cut.name in weights}
        cuts = [cut for cut in cuts if cut.name.removesuffix("bias") + "weight" not in rows or cut.name in rows]
        cuts += [
            Cut(f"{key.removesuffix(weights[key].parameter)}bias", 0, number)
            for key, number in rows.items()
            if weights[key].bias is not None
        ]
        own = self._sites[name]
        return [*cuts, Cut(f"{name}.{own.parameter}", int(not own.transposed), unit)]

    def _reach(self, x: Tensor, chosen: Tensor) -> dict[tuple[str, int], Tensor]:
        """For each parameter and axis, bool [size]: on which of its entries the chosen inputs [in] depend."""
        parameters = dict(self._block.named_parameters())
        cotangent = self._weights.expand(-1, x.shape[-1]).reshape(x.shape) * chosen
        gradients = torch.autograd.grad(x, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True)
        return {
            (name, axis): (gradient != 0).transpose(0, axis).flatten(1).any(1) if gradient.ndim > 1 else gradient != 0
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
            for axis in range(gradient.ndim)
        }

    def _kind(self, name: str, units: int, columns: int, cuts: list[Cut]) -> Kind:
        parameters = dict(self._block.named_parameters())
        freed = 0
        for cut in cuts:
            entries = cut.unit.bincount(minlength=units)
            if len(entries.unique()) > 1:
                raise InputError(f"{cut.name} has units of different sizes: leave it out with --ignore {cut.name}")
            freed += int(entries[0]) * parameters[cut.name].numel() // len(cut.unit)
        return Kind(name, units, columns, freed, tuple(cuts))


def shallow_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config for a model of one block."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, name, value[:1])  # one entry for every block
    text.num_hidden_layers = 1
    return config


def _shallow(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config with one block, its weights not initialised."""
    try:
        with no_init_weights():
            shallow: PreTrainedModel = type(model)(shallow_config(model.config)).float().eval()
    except UNBUILDABLE as error:
        raise InputError(
            f"{type(model).__name__} cannot be built with one block ({error}), so its units cannot be found: use a "
            "pattern without units"
        ) from error
    return shallow
