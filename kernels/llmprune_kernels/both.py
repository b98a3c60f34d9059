"""A 2:4 weight kept twice: for few rows and for many; each product runs the way that was faster when it was timed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from llmprune_kernels.decode import ROWS
from llmprune_kernels.layout import Layout
from llmprune_kernels.measured import Measured, Problem, measured
from llmprune_kernels.pack24 import Packed24
from llmprune_kernels.prefill import trial


def both(few: Layout[Packed24], many: Layout[Packed24], table: Measured | None = None) -> Layout[Packed24]:
    """The layout that holds the tensors of two.

    A shape is timed when it is first run, in powers of two of the rows. In a CUDA graph that is captured before,
    `few` runs up to ROWS rows and `many` above.

    Args:
        few: made for few rows; two tensors.
        many: made for many rows.
        table: where the times are kept; None for the table of x's device.
    """

    def prepare(packed: Packed24) -> list[Tensor]:
        return [*few.prepare(packed), *many.prepare(packed)]

    def restore(tensors: Sequence[Tensor], out_features: int, in_features: int) -> Packed24:
        return few.restore(tensors[:2], out_features, in_features)

    def multiply(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        problem = Problem.of(x, out_features)
        ways = {"few": (few, tensors[:2]), "many": (many, tensors[2:])}
        sample = functools.cache(lambda: trial(x, problem.rows))  # made only where something is timed

        def run(name: str, rows: Tensor) -> Tensor:
            layout, own = ways[name]
            return layout.multiply(rows, own, bias, out_features)

        candidates = {name: functools.partial(lambda name: run(name, sample()), name) for name in ways}
        usual = "few" if x.shape[0] <= ROWS else "many"
        return run((table or measured(x.device)).fastest(problem, candidates, usual), x)

    return Layout(Packed24, prepare, restore, multiply, "1.125")
