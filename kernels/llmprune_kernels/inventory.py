"""The packed layers of a model, and how many weights it has, packed or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from llmprune_kernels.packed_linear import PackedLinear


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """All packed layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


@torch.no_grad()
def count_weights(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are not zero; those of a packed layer as if it were dense."""
    parameters = nonzero = 0
    seen: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, PackedLinear):
            own.pop("values", None)
            parameters += module.in_features * module.out_features
            nonzero += int(module.packed.values.count_nonzero())
        for parameter in own.values():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                parameters += parameter.numel()
                nonzero += int(parameter.count_nonzero())
    return parameters, nonzero
