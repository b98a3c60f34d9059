"""Does this device's sparse tensor core compute what the fragment maps say, when reached through this Triton?

Triton does not promise which element of a tensor a piece of inline assembly receives. So before a layer relies on it,
small integers, whose sums are exact in any order, are multiplied once per device, dtype, versions and text of the
kernel, for every cut of the work that layers use; the verdict is kept with the measured times. Anything but equality in
every place is a no.
"""

from __future__ import annotations

import functools
import warnings

import torch

from llmprune_kernels.decode import CUTS, PTX_NAMES, Variant, expand, launch
from llmprune_kernels.fragments import to_fragments
from llmprune_kernels.launch import trouble
from llmprune_kernels.measured import Problem, measured
from llmprune_kernels.pack24 import pack24

OUT_FEATURES = 70  # a padded tile of rows
WHOLE = 19 * 256  # inputs: more blocks than warps take in one turn, and most layers fill the last one
PARTIAL = WHOLE - 100
LARGEST = 2.0**8  # of integers that every 16-bit dtype holds exactly


def mma_sp_works(device: torch.device, dtype: torch.dtype) -> bool:
    """True if layers on `device` may use layout "decode" for weights of `dtype`.

    A device that has a sparse tensor core and fails is said once in a process, as a warning. The first time on a device
    compiles some dozen kernels, which takes seconds.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which nothing can be tried.
    """
    if device.type != "cuda" or dtype not in PTX_NAMES or torch.version.hip is not None:
        return False
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a packed layer cannot be laid out while a CUDA graph is captured: do it before")
    return _verdict(torch.cuda.current_device() if device.index is None else device.index, dtype)


@functools.cache
def _verdict(index: int, dtype: torch.dtype) -> bool:
    if torch.cuda.get_device_capability(index) < (8, 0):
        return False
    device = torch.device("cuda", index)
    problem = Problem(OUT_FEATURES, WHOLE, str(dtype).removeprefix("torch."), CUTS[-1][0])
    with torch.cuda.device(device):
        try:
            wrong = measured(device).remembered(problem, "self-test", lambda: wrong_tokens(device, dtype), [])
        except trouble() as error:
            _warn(index, f"could not be tried ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
            return False
    if wrong:
        _warn(index, f"gave wrong sums in the self-test ({dtype}, tokens {wrong})")
    return not wrong


def _warn(index: int, what: str) -> None:
    name = torch.cuda.get_device_name(index)
    warnings.warn(f"the sparse tensor core of {name} {what}: 2:4 weights run by the portable kernel", stacklevel=4)


def wrong_tokens(device: torch.device, dtype: torch.dtype) -> list[int]:
    """The numbers of tokens for which a product of integers is not exact; 0 if expanding the weight is not."""
    wrong = set()
    with torch.device("cpu"):  # whatever the user's default is, the integers are drawn there
        for tokens, few, large in CUTS:
            for variant in {few, large}:
                if not _exact(WHOLE, max(1, tokens - 3), variant, device, dtype):
                    wrong.add(tokens)
            if not _exact(PARTIAL, tokens, few, device, dtype):
                wrong.add(tokens)
        if not _expands(device, dtype):
            wrong.add(0)
    return sorted(wrong)


def _integers(inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """A 2:4 weight [OUT_FEATURES, inputs] of -3 ... 3."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (OUT_FEATURES, inputs), generator=generator).to(dtype)
    groups = weight.unflatten(1, (-1, 4))
    groups.scatter_(2, torch.rand(groups.shape, generator=generator).argsort(2)[..., :2], 0.0)
    return weight


def _exact(inputs: int, tokens: int, variant: Variant, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether x W^T + bias comes out equal, in the dtype and with the bias that layers have.

    Of x so few entries are not zero that no sum exceeds what the dtype holds exactly.
    """
    weight = _integers(inputs, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (tokens, inputs), generator=generator).double()
    x *= torch.rand(tokens, inputs, generator=generator) < 0.1
    bias = torch.randint(-3, 4, (OUT_FEATURES,), generator=generator).double()
    expected = x @ weight.double().T + bias
    assert float(expected.abs().max()) < LARGEST
    tensors = [tensor.to(device) for tensor in to_fragments(pack24(weight))]
    out = torch.full((tokens, OUT_FEATURES), torch.nan, dtype=dtype, device=device)
    launch(x.to(device, dtype), tensors, bias.to(device, dtype), out, variant)
    return torch.equal(out.cpu().double(), expected)


def _expands(device: torch.device, dtype: torch.dtype) -> bool:
    weight = _integers(PARTIAL, dtype)
    dense = expand([tensor.to(device) for tensor in to_fragments(pack24(weight))])
    return torch.equal(dense[:OUT_FEATURES, :PARTIAL].cpu(), weight)
