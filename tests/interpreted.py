"""Products by a layout's kernel in Triton's interpreter, which must hold the kernels before they are first imported.

`errors` runs the cases in a process of its own, this file; the tests' own process stays as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Case:
    """x [rows, inputs] times a weight [outputs, inputs]."""

    layout: str
    dtype: str
    rows: int
    outputs: int
    inputs: int
    bias: bool


def errors(cases: list[Case]) -> dict[Case, float]:
    """For each case its largest error, as a share of what rounding explains; NaN where nothing was written."""
    said = answer(Path(__file__), [asdict(case) for case in cases])
    return dict(zip(cases, json.loads(said), strict=True))


def answer(script: Path, asked: object) -> str:
    """What a script of these tests prints when it is asked something, in a process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, input=json.dumps(asked), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def weight(case: Case) -> torch.Tensor:
    """A dense weight that fits the layout's format, with rows and groups that hold less than they may."""
    from llmprune_kernels.layouts import LAYOUTS
    from llmprune_kernels.pack24 import Packed24

    drawn = torch.randn(case.outputs, -(-case.inputs // 4) * 4)
    if LAYOUTS[case.layout].form is Packed24:
        groups = drawn.unflatten(1, (-1, 4))
        groups.scatter_(2, torch.rand(groups.shape).argsort(2)[..., :2], 0.0)
        drawn[torch.rand(drawn.shape) < 0.2] = 0.0
        drawn[0] = 0.0
    else:
        drawn[torch.rand(drawn.shape) < 0.5] = 0.0
        drawn[0] = 0.0
        drawn[-1] = torch.randn(drawn.shape[1])  # a row without zeros
    return drawn[:, : case.inputs].to(getattr(torch, case.dtype))


def error(case: Case) -> float:
    """Against the dense product in float64."""
    from llmprune_kernels.bitmap import pack_bitmap
    from llmprune_kernels.layouts import LAYOUTS
    from llmprune_kernels.op import nm_linear
    from llmprune_kernels.pack24 import Packed24, pack24

    torch.manual_seed(case.rows * case.outputs + case.inputs)
    layout, dense = LAYOUTS[case.layout], weight(case)
    x = torch.randn(case.rows, case.inputs).to(dense.dtype)
    assert x.new_empty(8).isnan().all(), "outputs are not filled before kernels write them"
    bias = torch.randn(case.outputs).to(dense.dtype) if case.bias else None
    packed = pack24(dense) if layout.form is Packed24 else pack_bitmap(dense)
    y = nm_linear(x, layout.prepare(packed), bias, case.outputs, case.layout)
    assert y.dtype == x.dtype and y.shape == (case.rows, case.outputs)
    added = torch.zeros(case.outputs).double() if bias is None else bias.double()
    expected = x.double() @ dense.double().T + added
    terms = x.double().abs() @ dense.double().abs().T + added.abs()
    eps = torch.finfo(x.dtype).eps
    rounding = eps if x.dtype == torch.bfloat16 else eps / 2  # the interpreter cuts bfloat16 off
    allowed = rounding * 1.01 * expected.abs() + 1e-6 * terms + 1e-7
    return float(((y.double() - expected).abs() / allowed).max()) if y.numel() else 0.0


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps([error(Case(**case)) for case in json.load(sys.stdin)]))
