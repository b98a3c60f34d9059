"""Which layout a device runs best, for a whole model at once."""

from __future__ import annotations

import torch
from torch import nn

from llmprune_kernels.linear import PackedLinear, SparseLinear24
from llmprune_kernels.selftest import mma_sp_works


def default_layout(layer: PackedLinear) -> str:
    """The layout that the layer's device runs best."""
    if layer.values.device.type != "cuda":
        return layer.CANONICAL
    if not isinstance(layer, SparseLinear24):
        return "bitmap-rows"
    return "decode" if mma_sp_works(layer.values.device, layer.values.dtype) else "portable"


@torch.no_grad()
def lay_out(model: nn.Module, layout: str | None = None) -> None:
    """Put every packed layer of a model into a layout, one after the other.

    Args:
        layout: a name in llmprune_kernels.layouts.LAYOUTS; None takes what each layer's device runs best.

    Raises:
        ValueError: a layer's format has no such layout.
    """
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.use_layout(layout or default_layout(layer))
