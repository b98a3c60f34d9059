"""Where a bias can live: `from_pretrained` drops a bias that the config does not announce, silently.

Which config flag announces which biases is found by building the model without memory (on the meta device)
with each flag turned on and looking at what appears. No list of families.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmprune.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PretrainedConfig


def bias_flags(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    """For every config flag that adds biases to linear layers and nothing else: the layers' names."""
    present = _parameter_names(type(model), model.config)
    if present is None:
        return {}
    flags = {}
    for flag, value in vars(model.config).items():
        if value is not False or "bias" not in flag:
            continue
        config = copy.deepcopy(model.config)
        setattr(config, flag, True)
        names = _parameter_names(type(model), config)
        if names is None or not present < names:
            continue
        added = names - present
        if all(name.endswith(".bias") for name in added):
            layers = frozenset(name.removesuffix(".bias") for name in added)
            if all(isinstance(_submodule(model, layer), nn.Linear) for layer in layers):
                flags[flag] = layers
    return flags


def add_biases_(model: PreTrainedModel, sites: Sequence[Site]) -> list[str]:
    """Give zero biases to the sites that lack one, where a config flag can announce them.

    Every layer that the flag creates a bias for gets one, pruned or not: the config speaks for all of them.

    Returns:
        The flags that were set, in order.
    """
    chosen = _flags_for(model, sites)
    for flag, layers in chosen.items():
        setattr(model.config, flag, True)
        _add_zeros(model, layers)
    return list(chosen)


def with_biases(model: PreTrainedModel, sites: Sequence[Site]) -> PreTrainedModel:
    """What `add_biases_` will make of a model, on the meta device; the model itself if that is nothing."""
    chosen = _flags_for(model, sites)
    if not chosen:
        return model
    config = copy.deepcopy(model.config)
    for flag in chosen:
        setattr(config, flag, True)
    with torch.device("meta"):
        return type(model)(config)


def _flags_for(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, frozenset[str]]:
    """The flags that announce biases for the sites that lack one, with the layers that each gives a bias to."""
    lacking = {site.name for site in sites if site.bias is None}
    chosen: dict[str, frozenset[str]] = {}
    for flag, layers in sorted(bias_flags(model).items(), key=lambda item: len(item[1])) if lacking else ():
        if layers & lacking:
            lacking -= layers
            chosen[flag] = layers
    return chosen


def _add_zeros(model: PreTrainedModel, layers: Iterable[str]) -> None:
    for name in layers:
        layer = _submodule(model, name)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if layer.bias is None:
            zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
            layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def _submodule(model: PreTrainedModel, name: str) -> nn.Module:
    return model.get_submodule(name)


def _parameter_names(cls: type[PreTrainedModel], config: PretrainedConfig) -> frozenset[str] | None:
    """The names of a model of that config, or None if the class refuses the config."""
    try:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
    except (ValueError, TypeError, AttributeError):
        return None  # a flag that this class cannot take announces no bias
    return frozenset(name for name, _ in model.named_parameters())
