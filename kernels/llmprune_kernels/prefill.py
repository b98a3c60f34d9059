"""2:4 weights for many rows at a time: cuSPARSELt's product with its own compressed tensor, the algorithm searched.

What torch.sparse.to_sparse_semi_structured(weight) keeps is the tensor that is kept here; the calls are those of
torch/sparse/semi_structured.py. cuSPARSELt takes 16-bit weights whose sides are multiples of 16, on CUDA devices of
capability 8.0 and above.

Its compressed form is not documented, so the way back is a product with the identity, which is exact for finite
weights. `prepare` makes that product once and compares: a library that gave back other weights is found out here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune_kernels.format import FormatError
from llmprune_kernels.launch import filled_up
from llmprune_kernels.layout import Layout
from llmprune_kernels.measured import Problem, measured
from llmprune_kernels.pack24 import Packed24, pack24, unpack24

SIDES, ROWS = 16, 8  # multiples that cuSPARSELt asks of a 16-bit weight's sides and of x's rows
DTYPES = (torch.float16, torch.bfloat16)
COLUMNS_AT_ONCE = 1024  # of the identity; bounds the memory of the way back
DEFAULT = [0]  # the algorithm's number; a search finds also how the inputs are split


def refusal(packed: Packed24) -> str | None:
    """Why cuSPARSELt does not take a weight; None if it does."""
    (outputs, inputs), values = packed.shape, packed.values
    if values.dtype not in DTYPES:
        return f"cuSPARSELt takes float16 and bfloat16 weights, not {str(values.dtype).removeprefix('torch.')}"
    if not (outputs and inputs) or outputs % SIDES or inputs % SIDES:
        return f"cuSPARSELt takes weights whose sides are multiples of {SIDES}, not {outputs} x {inputs}"
    if not (values.is_cuda and torch.backends.cusparselt.is_available()):
        return f"cuSPARSELt needs a CUDA device and a torch built with it; the weight is on {values.device}"
    if not bool(values.isfinite().all()):
        return "a weight that is not finite cannot be brought back from cuSPARSELt's form"
    return None


def prepare(packed: Packed24) -> list[Tensor]:
    """cuSPARSELt's tensor, and where the weight holds -0.0 (a product does not give its sign back).

    Raises:
        FormatError: cuSPARSELt does not take the weight: its sides, its dtype, its device, or it is not finite.
        RuntimeError: cuSPARSELt's product does not give the weights back.
    """
    outputs, inputs = packed.shape
    reason = refusal(packed)
    if reason is not None:
        raise FormatError(f"{reason}: keep it in another layout")
    dense = unpack24(packed)
    compressed = torch._cslt_compress(dense)
    if not torch.equal(_dense(compressed, outputs, inputs), dense):
        raise RuntimeError(f"cuSPARSELt gave back other weights than the {outputs} x {inputs} it was given")
    return [compressed, _negative_zeros(dense)]


def restore(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Packed24:
    """The canonical form; bit by bit what `pack24` made."""
    compressed, negative_zeros = tensors
    dense = _dense(compressed, out_features, in_features)
    dense.view(-1)[negative_zeros] = -0.0
    return pack24(dense)


def multiply(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """x W^T + bias by the algorithm that cuSPARSELt's search found for this shape; its default in a CUDA graph that
    is captured before the shape was ever run."""
    problem = Problem.of(x, out_features)
    if not x.shape[0]:
        return x.new_empty(0, out_features)
    algorithm = measured(x.device).remembered(
        problem, "cuSPARSELt", lambda: search(trial(x, problem.rows), tensors[0], bias), DEFAULT
    )
    return product(x, tensors[0], bias, algorithm)


def product(x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: list[int]) -> Tensor:
    """x [rows, in] times the compressed weight, transposed, plus bias [out], by one algorithm of cuSPARSELt's."""
    padded = _padded(x)
    y = torch._cslt_sparse_mm(compressed, padded.t(), bias, None, None, True, *algorithm)
    return y[: x.shape[0]]


def search(x: Tensor, compressed: Tensor, bias: Tensor | None = None) -> list[int]:
    """The algorithm that cuSPARSELt's search finds for x [rows, in] and bias [out], for `product`; takes a moment."""
    library = torch._C._cusparselt
    algorithm, *split, _ = library.mm_search(compressed, _padded(x).t(), bias, None, None, True)  # type: ignore[attr-defined]
    return [algorithm, *split]


def trial(x: Tensor, rows: int) -> Tensor:
    """Normal numbers [rows, in], like x in all else; the caller's random numbers stay as they are."""
    generator = torch.Generator(x.device).manual_seed(0)
    return torch.randn(rows, x.shape[1], dtype=x.dtype, device=x.device, generator=generator)


def _padded(x: Tensor) -> Tensor:
    return filled_up(x, rows=ROWS).contiguous()


def _dense(compressed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight, column by column: its product with the identity."""
    dense = compressed.new_empty(outputs, inputs)
    for start in range(0, inputs, COLUMNS_AT_ONCE):
        columns = torch.arange(start, min(start + COLUMNS_AT_ONCE, inputs), device=compressed.device)
        identity = F.one_hot(columns, inputs).to(compressed.dtype)
        dense[:, start : start + COLUMNS_AT_ONCE] = product(identity, compressed, None, DEFAULT).t()
    return dense.add_(0.0)  # -0.0 + 0.0 is 0.0: the sign of a zero sum is the library's own affair


def _negative_zeros(dense: Tensor) -> Tensor:
    """Indices of -0.0 in the flat weight."""
    return ((dense == 0) & dense.signbit()).flatten().nonzero().flatten()


PREFILL = Layout(Packed24, prepare, restore, multiply, "0.5625")
