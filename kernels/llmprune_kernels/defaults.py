"""Which layout a device runs best."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune_kernels.selftest import mma_sp_works

KERNELS = (torch.float16, torch.bfloat16, torch.float32)


def default_layout(canonical: str, values: Tensor) -> str:
    """The layout for a weight whose canonical form is `canonical` and whose values are `values`."""
    if values.device.type != "cuda" or values.dtype not in KERNELS:
        return canonical
    if canonical == "bitmap":
        return "bitmap-rows"
    return "decode" if mma_sp_works(values.device, values.dtype) else "portable"
