"""Does this device's sparse tensor core compute what the fragment maps say, when reached through this Triton?

Triton does not promise which element of a tensor a piece of inline assembly receives. So before a layer relies on it,
small integers, whose sums are exact in any order, are multiplied once per device, dtype and versions, for every cut of
the work that layers use, and the verdict is kept with the measured times. Anything but equality in every place is a no.
"""

from __future__ import annotations

import functools
import warnings

import torch

from llmprune_kernels.decode import PTX_NAMES, ROWS, TOKEN_TILE, default_variant, expand, launch
from llmprune_kernels.fragments import to_fragments
from llmprune_kernels.measured import Problem, measured
from llmprune_kernels.pack24 import pack24

TOKENS = (1, TOKEN_TILE - 1, 2 * TOKEN_TILE - 3, 4 * TOKEN_TILE, ROWS)
OUT_FEATURES, INPUTS = 70, 19 * 256 - 100  # more blocks than warps, a padded tile of rows, a short last block


def mma_sp_works(device: torch.device, dtype: torch.dtype) -> bool:
    """True if layers on `device` may use layout "decode" for weights of `dtype`.

    A device that has a sparse tensor core and fails is said once in a process, as a warning. Not to be asked first
    while a CUDA graph is captured: nothing can be tried then, and the answer is no.
    """
    if device.type != "cuda" or dtype not in PTX_NAMES or torch.version.hip is not None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _verdict(index, dtype)


@functools.cache
def _verdict(index: int, dtype: torch.dtype) -> bool:
    if torch.cuda.get_device_capability(index) < (8, 0):
        return False
    device = torch.device("cuda", index)
    problem = Problem(OUT_FEATURES, INPUTS, str(dtype).removeprefix("torch."), ROWS)
    with torch.cuda.device(device):
        wrong = measured(device).remembered(problem, "self-test", lambda: wrong_tokens(device, dtype), [-1])
    if wrong:
        name = torch.cuda.get_device_name(index)
        warnings.warn(
            f"the sparse tensor core of {name} gave wrong sums in the self-test ({dtype}, tokens {wrong}): "
            "2:4 weights run by the portable kernel instead",
            stacklevel=2,
        )
    return not wrong


def wrong_tokens(device: torch.device, dtype: torch.dtype) -> list[int]:
    """The numbers of tokens for which a product of integers is not exact."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (OUT_FEATURES, INPUTS), generator=generator).float()
    groups = weight.unflatten(1, (-1, 4))
    groups.scatter_(2, torch.rand(groups.shape, generator=generator).argsort(2)[..., :2], 0.0)
    tensors = [tensor.to(device) for tensor in to_fragments(pack24(weight.to(dtype)))]
    wrong = [] if torch.equal(expand(tensors)[:OUT_FEATURES, :INPUTS].cpu().float(), weight) else [0]
    for tokens in TOKENS:
        x = torch.randint(-2, 3, (tokens, INPUTS), generator=generator).float()
        out = torch.full((tokens, OUT_FEATURES), torch.nan, device=device)
        launch(x.to(device, dtype), tensors, None, out, default_variant(tokens))
        if not torch.equal(out.cpu(), x @ weight.T):  # below 2^24, so float32 is exact
            wrong.append(tokens)
    return wrong
