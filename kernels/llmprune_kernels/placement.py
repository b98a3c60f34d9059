"""Layouts for a whole model at once."""

from __future__ import annotations

import torch
from torch import nn

from llmprune_kernels.packed_linear import PackedLinear


@torch.no_grad()
def lay_out(model: nn.Module, layout: str | None = None) -> None:
    """Put every packed layer of a model into a layout, one after the other.

    Args:
        layout: a name in llmprune_kernels.layouts.LAYOUTS; None takes what each layer's device runs best.

    Raises:
        ValueError: a layer's format has no such layout, or the layout does not take its weight.
    """
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            if layout is None:
                layer.use_default_layout()
            else:
                layer.use_layout(layout)
