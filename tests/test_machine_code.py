"""The reader of machine code, on a kernel whose machine code is known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from machine_code import build, count

SUM = """
import triton
import triton.language as tl


@triton.jit
def row_sums(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        total += tl.load(x + row * columns + start + lanes)
    tl.store(out + row, tl.sum(total, 0))
"""


@pytest.fixture(scope="module")
def row_sums(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("kernel") / "row_sums.py"
    path.write_text(SUM, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("row_sums", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.row_sums


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_instructions_registers_and_loops_are_counted(row_sums: Any, arch: int) -> None:
    signature = {"x": "*fp32", "out": "*fp32", "columns": "i32"}
    code = build(row_sums, signature, {"BLOCK": 512}, ["x", "out", "columns"], num_warps=4, arch=arch, num_stages=1)
    assert 8 <= code.registers <= 64 and code.spills == 0
    assert 4 * 4 <= code.shared <= 1024, "one float32 per warp, to add up"
    loads = count(code.opcodes, "LDG")
    assert loads == count(code.opcodes, "LDG.E.128") > 0, "512 elements / 128 threads: 16 bytes per thread"
    inner = [loop for loop in code.loops if count(loop, "LDG")]
    assert inner
    for loop in inner:  # a Blackwell FADD2 is two additions
        assert count(loop, "FADD") + count(loop, "FADD2") == 4 * count(loop, "LDG")
    assert count(code.opcodes, "SHFL") >= 5 and not any(count(loop, "SHFL") for loop in inner)


def test_unaligned_arguments_are_read_in_small_pieces(row_sums: Any) -> None:
    signature = {"x": "*fp32", "out": "*fp32", "columns": "i32"}
    code = build(row_sums, signature, {"BLOCK": 512}, [], num_warps=4, arch=90, num_stages=1)
    assert count(code.opcodes, "LDG.E.128") == 0 < count(code.opcodes, "LDG.E")


def test_the_signature_names_every_argument(row_sums: Any) -> None:
    with pytest.raises(AssertionError, match="columns"):
        build(row_sums, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 512}, [], num_warps=4, arch=90)
