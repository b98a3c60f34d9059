"""`nm_linear`: x times a packed weight, as one custom operator that torch.compile and CUDA graphs take as it is."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from llmprune_kernels.layouts import LAYOUTS

NO_GRADIENTS = (
    "a packed layer has no gradients: train with its dense weight (layer.to_dense()), or run it in torch.no_grad()"
)


@torch.library.custom_op("llmprune::nm_linear", mutates_args=())
def nm_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: int, layout: str) -> Tensor:
    """y = x W^T + bias with a packed W [out, in].

    Args:
        x: [..., in], in the weight's dtype and on its device.
        weight: the tensors of `layout`, made by LAYOUTS[layout].prepare.
        bias: [out] or None.
        out_features: out.
        layout: a name in llmprune_kernels.layouts.LAYOUTS.

    Returns:
        [..., out], in x's dtype, under autocast too; sums are float32 or wider.

    Raises:
        RuntimeError: in a backward pass.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # Triton launches on the current device; in a model on several it may be another. Autocast has been heeded before.
    with torch.cuda.device_of(rows), torch.autocast(x.device.type, enabled=False):
        y = LAYOUTS[layout].multiply(rows, weight, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


@nm_linear.register_fake
def _(x: Tensor, weight: list[Tensor], bias: Tensor | None, out_features: int, layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def refuse_tangent(x: Tensor) -> None:
    """Raise RuntimeError in forward-mode differentiation, where a custom operator's derivative would silently be 0."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(NO_GRADIENTS)


def _no_gradients(ctx: Any, gradient: Tensor) -> NoReturn:
    raise RuntimeError(NO_GRADIENTS)


nm_linear.register_autograd(_no_gradients)
