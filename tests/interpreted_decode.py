"""Run in a process of its own with TRITON_INTERPRET=1: the decode kernel, its assembly emulated, against float64.

Prints one JSON line per case: what it is, and the largest error in any place of the output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import ptx
import torch
from llmprune_kernels import pack24, selftest
from llmprune_kernels.decode import Variant, expand, launch
from llmprune_kernels.fragments import to_fragments
from llmprune_kernels.triton_kernels import mma_sp
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class Call:
    """What Triton expects of a piece of assembly: its results by number."""

    def __init__(self, results: list[TensorHandle]) -> None:
        self.results = results

    def get_result(self, i: int) -> TensorHandle:
        return self.results[i]


def create_inline_asm(
    self: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> Call:
    """One thread per row of the tensors, its registers in the columns: the map that the kernel is built on."""
    rows = [value.data.reshape(-1, pack) for value in values]
    registers = ptx.run(assembly, constraints, [row.astype(row.dtype, copy=False) for row in rows])
    data = np.stack(registers, axis=1).reshape(values[0].data.shape)
    (result,) = types
    scalar = result.scalar
    kind = np.dtype(np.float32 if scalar.is_floating() else np.int32)
    return Call([TensorHandle(data.view(kind), scalar)])


def case(rows: int, inputs: int, tokens: int, dtype: torch.dtype, variant: Variant, bias: bool, exact: bool) -> float:
    """The largest error of one product, NaN where the kernel wrote nothing."""
    generator = torch.Generator().manual_seed(rows * inputs + tokens)
    width = -(-inputs // 4) * 4
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator)
    offset = torch.randn(rows, generator=generator).to(dtype)
    if exact:
        weight, x, offset = (weight * 2).round(), (x * 2).round(), (offset * 2).round()
    four = weight.view(rows, -1, 4)
    four.scatter_(2, torch.rand(four.shape, generator=generator).argsort(2)[..., :2], 0.0)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0.0  # groups of one weight and of none
    weight, x = weight[:, :inputs].to(dtype), _among_nan(x.to(dtype))
    tensors = to_fragments(pack24(weight))
    assert torch.equal(expand(tensors)[:rows, :inputs], weight), "expand"
    out = torch.full((tokens, rows), torch.nan)
    launch(x, tensors, offset if bias else None, out, variant)
    expected = x.double() @ weight.double().T + (offset.double() if bias else 0.0)
    error = (out.double() - expected).abs().max()
    return float("nan") if out.isnan().any() else float(error)


def _among_nan(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in the middle of a wider tensor: whatever is read beside them shows."""
    tokens, inputs = x.shape
    wide = torch.full((tokens + 2, 8 + -(-inputs // 8) * 8 + 8), torch.nan, dtype=x.dtype)
    wide[1:-1, 8 : 8 + inputs] = x
    return wide[1:-1, 8 : 8 + inputs]


def self_test() -> int:
    """Numbers of tokens that the self-test finds wrong."""
    return len(selftest.wrong_tokens(torch.device("cpu"), torch.bfloat16))


def say(arguments: list[Any], error: float) -> None:
    sys.stdout.write(json.dumps({"case": arguments, "error": error}) + "\n")


def main() -> None:
    InterpreterBuilder.create_inline_asm = create_inline_asm
    selftest.OUT_FEATURES, selftest.WHOLE, selftest.PARTIAL = 20, 768, 668  # emulation is slow
    say([], self_test())
    good, wrong = mma_sp.assembly, lambda dtype: good(dtype).replace(", 0x1;", ", 0x0;")
    mma_sp.assembly = wrong
    say([0], self_test())
    mma_sp.assembly = good
    for arguments in json.loads(sys.stdin.read()):
        rows, inputs, tokens, dtype, cut, bias, exact = arguments
        error = case(rows, inputs, tokens, getattr(torch, dtype), Variant(*cut), bias, exact)
        say(arguments, error)


if __name__ == "__main__":
    main()
