"""How many units every block keeps: what a model's config can say, and what the asked share of parameters needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.blocks import find_blocks
from llmprune.errors import InputError
from llmprune.structured.layout import UNBUILDABLE, Kind, Layout, shallow_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PretrainedConfig


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Widths:
    """What every block keeps.

    Attributes:
        kept: units by output projection, for the kinds that are cut.
        fixed: why the other kinds keep all of theirs, by output projection.
        removed: parameters of one block that go.
    """

    kept: dict[str, int]
    fixed: dict[str, str]
    removed: int


def choose_widths(
    model: PreTrainedModel,
    layout: Layout,
    goal: float,
    *,
    ignored: Collection[str] = (),
    keep_heads: bool = False,
    round_channels: int = 1,
    shares: Mapping[str, float] | None = None,
) -> Widths:
    """The widths with which a block has `goal` parameters left, or fewer by less than one unit.

    Coarse units (KV groups) keep the count nearest to their share among those that the config can say; the finest
    (channels) make up for the rest.

    Args:
        model: on any device, also meta.
        goal: parameters that one block may keep.
        ignored: output projections that the user leaves alone.
        keep_heads: leave units of several columns (KV groups) alone.
        shares: of the units of each kind that are wanted to stay; None means the same of all.
        round_channels: the count of channels becomes a multiple of it, rounded down.

    Raises:
        InputError: there is nothing that can be cut, or not enough.
    """
    options, fixed = {}, dict.fromkeys(layout.tied, "its inputs hang together")
    for kind in layout.kinds:
        if kind.site in ignored or (keep_heads and kind.columns > 1):
            fixed[kind.site] = "left out as asked" if kind.site in ignored else "kept as asked"
            continue
        options[kind.site] = _sayable(model, layout, kind)
        if not options[kind.site]:
            fixed[kind.site] = f"the config of {type(model).__name__} cannot say that there are fewer {kind.label}"
        elif kind.columns == 1:
            options[kind.site] = [count for count in options[kind.site] if count % round_channels == 0]
            if not options[kind.site]:
                raise InputError(
                    f"no multiple of round_channels {round_channels} is below the {kind.units} {kind.label} of "
                    f"{kind.site}: give a smaller number"
                )
    free = [kind for kind in layout.kinds if kind.site not in fixed]
    parameters = sum(p.numel() for p in find_blocks(model)[0][1].parameters())
    if not free:
        why = "; ".join(f"{site}: {reason}" for site, reason in fixed.items()) or "no units were found"
        raise InputError(f"{type(model).__name__} cannot be cut to smaller widths ({why}): use another pattern")
    kept = _fit(free, options, parameters - goal, shares)
    if kept is None:
        least = parameters - sum(kind.parameters * (kind.units - min(options[kind.site])) for kind in free)
        raise InputError(
            f"of the {parameters:,} parameters of a block {goal:,.0f} are to stay, but {least:,} always do: the fewest "
            f"{' and '.join(kind.label for kind in free)} that can be had; ask for a smaller sparsity"
        )
    return Widths(kept, fixed, sum(kind.parameters * (kind.units - kept[kind.site]) for kind in free))


def _fit(
    kinds: list[Kind],
    options: Mapping[str, list[int]],
    target: float,
    shares: Mapping[str, float] | None,
) -> dict[str, int] | None:
    """Units kept by each kind so that at least `target` parameters of a block go; None if that cannot be.

    The first choice of coarse counts with which the finest units come within one of the target; failing that, the
    one that takes least too much.
    """
    fine = min(kinds, key=lambda kind: kind.parameters)
    coarse = [kind for kind in kinds if kind is not fine]
    counts = [*options[fine.site], fine.units]
    share = 1 - target / sum(kind.units * kind.parameters for kind in kinds)
    wanted = shares or {kind.site: share for kind in kinds}
    ranked = [_nearest_first([*options[kind.site], kind.units], kind.units * wanted[kind.site]) for kind in coarse]
    step = max((b - a for a, b in itertools.pairwise(counts)), default=1)
    least, best = math.inf, None
    for places in sorted(itertools.product(*(range(len(r)) for r in ranked)), key=sum):
        kept = {kind.site: r[i] for kind, r, i in zip(coarse, ranked, places, strict=True)}
        rest = target - sum(kind.parameters * (kind.units - kept[kind.site]) for kind in coarse)
        left = max((count for count in counts if fine.parameters * (fine.units - count) >= rest - 1e-6), default=None)
        if left is None:
            continue
        surplus = fine.parameters * (fine.units - left) - rest
        if surplus < least:
            least, best = surplus, {**kept, fine.site: left}
        if surplus < fine.parameters * step:
            return best
    return best


def _nearest_first(counts: list[int], wanted: float) -> list[int]:
    return sorted(counts, key=lambda count: (abs(count - wanted), -count))


def _sayable(model: PreTrainedModel, layout: Layout, kind: Kind) -> list[int]:
    """The counts of units, fewer than now, that the config can say. For channels one of them stands for all."""
    if kind.columns == 1:
        return list(range(1, kind.units)) if config_changes(model, layout, {kind.site: kind.units - 1}) else []
    return [count for count in range(1, kind.units) if config_changes(model, layout, {kind.site: count})]


def config_changes(model: PreTrainedModel, layout: Layout, kept: Mapping[str, int]) -> dict[str, int] | None:
    """The entries of the config, as changed, with which a model is built that has so many units; None if none are.

    Found by building it on the meta device and comparing the shapes of all parameters.
    """
    found: dict[str, int] = {}
    for kind in layout.kinds:
        count = kept.get(kind.site, kind.units)
        if count != kind.units:
            wanted = _shapes_after(model, layout, {kind.site: count})
            fitting = (c for c in _candidates(model.config, kind, count) if _shapes(model, c) == wanted)
            changes = next(fitting, None)
            if changes is None:
                return None
            found |= changes
    return found


def changed_config(config: PretrainedConfig, changes: Mapping[str, int]) -> PretrainedConfig:
    """A copy of a config with other entries, checked as if read from a file.

    Raises:
        ValueError: the config's class does not accept them, among other exceptions of its own.
    """
    described = config.to_dict()
    text = described
    if config.get_text_config(decoder=True) is not config:
        text = next(v for v in described.values() if isinstance(v, dict) and "num_hidden_layers" in v)
    names = config.get_text_config(decoder=True).attribute_map
    text.update({names.get(name, name): value for name, value in changes.items()})
    changed = type(config).from_dict(described)
    changed._attn_implementation = config._attn_implementation
    return changed


def can_narrow(model: PreTrainedModel) -> bool:
    """True if some entry of the config takes one input from a matrix of the blocks and changes nothing outside of them.

    That is what channels need. It is known without looking for units, from the shapes of a block on the meta device.
    """
    shapes, path = _shapes(model, {}), find_blocks(model)[0][0]
    if shapes is None:
        return False
    inside = {name for name in shapes if name.startswith(f"{path}.")}
    text = model.config.get_text_config(decoder=True)
    for width in {size for name in inside if len(shapes[name]) == 2 for size in shapes[name]}:
        for name, value in vars(text).items():
            if value is not None and (value != width or isinstance(value, bool)):
                continue
            changed = _shapes(model, {name: width - 1})
            if changed is None or changed.keys() != shapes.keys():
                continue
            moved = {key for key in shapes if shapes[key] != changed[key]}
            if moved and moved <= inside and any(width in shapes[key] and width - 1 in changed[key] for key in moved):
                return True
    return False


def _candidates(config: PretrainedConfig, kind: Kind, count: int) -> list[dict[str, int]]:
    """What may say that there are `count` units: a number that is theirs, or the numbers of heads together."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    several: dict[str, int] = {}
    if heads % kind.units == 0:
        several = {"num_attention_heads": heads // kind.units * count}
        if not isinstance(getattr(type(text), "head_dim", None), property):  # then it follows from the others
            several["head_dim"] = kind.units * kind.columns // heads
        several |= {name: count for name in ("num_key_value_heads", "num_kv_heads") if getattr(text, name, None)}
    own = [name for name, value in vars(text).items() if value == kind.units and not isinstance(value, bool)]
    unset = [name for name, value in vars(text).items() if value is None]  # a default that follows from another
    return [*([several] if several else []), *({name: count} for name in [*own, *unset])]


def _shapes(model: PreTrainedModel, changes: Mapping[str, int]) -> Shapes | None:
    """The parameters of a model of the changed config with one block; None if there is no such model."""
    try:
        config = shallow_config(changed_config(model.config, changes))
        with torch.device("meta"):
            changed: Any = type(model)(config)
    except UNBUILDABLE:
        return None
    return {name: tuple(parameter.shape) for name, parameter in changed.named_parameters()}


def _shapes_after(model: PreTrainedModel, layout: Layout, kept: Mapping[str, int]) -> Shapes | None:
    """The shapes that the parameters of a model with one block are to have after a cut."""
    shapes = _shapes(model, {})
    if shapes is None:
        return None
    path = find_blocks(model)[0][0]
    for kind in layout.kinds:
        for cut in kind.cuts if kind.site in kept else ():
            shape = list(shapes[f"{path}.{cut.name}"])
            shape[cut.axis] = len(cut.unit) // kind.units * kept[kind.site]
            shapes[f"{path}.{cut.name}"] = tuple(shape)
    return shapes
