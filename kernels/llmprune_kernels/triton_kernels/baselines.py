# mypy: ignore-errors
"""What the kernels are measured against: a dense product with one row, and a launch that does nothing."""

import triton
import triton.language as tl


@triton.jit
def empty(marker):
    """Nothing; what it takes is the cost of a launch."""
    pass  # noqa: PIE790 (Triton compiles statements, a docstring is none)


@triton.jit
def dense_gemv(x, weight, y, outputs, inputs, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """y [outputs] = weight [outputs, inputs] x [inputs]; BLOCK_OUT rows per program, sums in float32."""
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    lines = weight + rows[:, None].to(tl.int64) * inputs
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_IN):
        columns = start + tl.arange(0, BLOCK_IN)
        inside = columns < inputs
        w = tl.load(lines + columns[None, :], mask=(rows[:, None] < outputs) & inside[None, :], other=0.0)
        v = tl.load(x + columns, mask=inside, other=0.0)
        total += w.to(tl.float32) * v.to(tl.float32)[None, :]
    tl.store(y + rows, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=rows < outputs)
