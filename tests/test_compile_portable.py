"""The portable kernel and the bitmap kernel, built for GPUs that are not there, as their host code launches them."""

from __future__ import annotations

import re

import pytest
import torch
from machine_code import SHARED_LIMIT, MachineCode, build, count

pytest.importorskip("triton")

from llmprune_kernels import bitmap_kernel, portable
from llmprune_kernels.launch import triton_dtype

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MANY = 1024  # quads of rows: 4096 outputs


def build_portable(rows: int, dtype: torch.dtype, arch: int, ones: tuple[str, ...] = ()) -> MachineCode:
    """`ones`: sizes that are 1, which a launch makes a constant."""
    from llmprune_kernels.triton_kernels.portable import linear24

    cut = portable.tiles(rows, dtype)
    number = f"*{NAMES[dtype]}"
    tensors = {
        "x": number,
        "values": "*i64" if dtype == torch.float32 else "*i32",
        "codes": "*i32",
        "bias": number,
        "out": "*fp32",
    }
    sizes = {size: "i32" for size in ("rows", "outputs", "groups", "width", "blocks") if size not in ones}
    constants = {
        "DTYPE": triton_dtype(dtype),
        "HAS_BIAS": True,
        "UPCAST": False,
        "OUTPUTS": cut.outputs,
        "ROWS": cut.rows,
        "GROUPS": portable.GROUPS,
        "UNROLL": cut.unroll,
        **dict.fromkeys(ones, 1),
    }
    aligned = [*tensors, *(size for size in ("outputs", "groups", "width") if size in sizes)]  # 4096 x 4096
    return build(linear24, {**tensors, **sizes}, constants, aligned, cut.warps, arch, portable.STAGES)


def build_bitmap(
    rows: int, dtype: torch.dtype, arch: int, quads: int = MANY, ones: tuple[str, ...] = ()
) -> MachineCode:
    from llmprune_kernels.triton_kernels.bitmap import linear_bitmap

    number = f"*{NAMES[dtype]}"
    tensors = {
        "x": number if dtype == torch.float32 else "*i64",
        "values": "*i32" if dtype == torch.float32 else "*i16",
        "records": "*i32",
        "bias": number,
        "out": number,
    }
    sizes = {size: "i32" for size in ("rows", "outputs", "parts", "width") if size not in ones}
    warps = bitmap_kernel.warps(quads)
    constants = {"DTYPE": triton_dtype(dtype), "HAS_BIAS": True, "TOKENS": rows, "WARPS": warps}
    aligned = [*tensors, *(size for size in ("outputs", "width") if size in sizes)]
    return build(linear_bitmap, {**tensors, **sizes}, constants | dict.fromkeys(ones, 1), aligned, warps, arch, 1)


def inner(code: MachineCode) -> dict[str, int]:
    return max(code.loops, key=count)


@pytest.fixture(scope="module", params=[80, 90, 100])
def one_token(request: pytest.FixtureRequest) -> MachineCode:
    return build_bitmap(1, torch.bfloat16, request.param)


def test_sizes_of_one_are_constants_to_a_launch() -> None:
    assert not build_portable(1, torch.float32, 90, ("rows", "outputs", "groups", "blocks")).spills
    assert not build_bitmap(1, torch.bfloat16, 90, 1, ("rows", "outputs", "parts", "width")).spills


def test_portable_few_rows() -> None:
    code = build_portable(16, torch.bfloat16, 90)
    assert code.spills == 0 and code.registers <= 168 and code.shared <= SHARED_LIMIT
    loop, cut = inner(code), portable.tiles(16, torch.bfloat16)
    groups = portable.PARTS * portable.GROUPS * cut.outputs // (32 * cut.warps)  # per thread and block of inputs
    assert count(loop, "HMMA.16816.F32.BF16") == groups, "one product for a thread's 16 weights, 4 of each plane"
    assert count(loop, "BAR") <= 2, "x and the weights arrive a block ahead: threads wait for one another once"
    assert count(loop) <= 22 * groups
    loads = count(loop, "LDG.", "LDGSTS.")
    assert loads == count(loop, "LDGSTS.E.BYPASS.128") > 0, "all loads are 16 bytes wide and go past the registers"


@pytest.mark.parametrize(
    ("rows", "dtype", "arch"),
    [(64, torch.float16, 80), (65, torch.bfloat16, 100), (1, torch.float32, 90)],
    ids=["64-fp16-sm80", "65-bf16-sm100", "1-fp32-sm90"],
)
def test_portable_other_tiles(rows: int, dtype: torch.dtype, arch: int) -> None:
    code = build_portable(rows, dtype, arch)
    assert code.spills == 0 and code.shared <= SHARED_LIMIT
    assert (count(code.opcodes, "HMMA") > 0) == (dtype != torch.float32), "float32 stays exact"
    assert count(inner(code), "LDGSTS.E.BYPASS.128") > 0


def test_bitmap_one_token(one_token: MachineCode) -> None:
    assert one_token.spills == 0 and one_token.shared <= 1024
    assert one_token.registers <= 72, "7 blocks of 4 warps on a multiprocessor, to have enough loads under way"
    loop = inner(one_token)
    assert count(loop) <= 10.6 * 32, "instructions for the 32 weights of a lane; memory allows for 11 each"
    assert count(loop, "LDG.E.U16") == 32 and count(loop, "LDG.E.64") == 2, "values, and x in words of four"
    assert count(loop, "LDG") == 32 + 2 + 6
    assert not count(loop, "BAR", "STS", "LDS"), "no layout is converted"


def test_bitmap_values_are_fetched_a_step_ahead(one_token: MachineCode) -> None:
    """All loads of values come before the loop first, and after the products of the step before within it."""
    loop = inner(one_token)
    assert count(one_token.opcodes, "LDG.E.U16") >= 2 * 32 and count(loop, "LDG.E.U16") == 32
    body = one_token.sass[one_token.sass.index("LDG.E.64") :]  # x is read first in the loop
    order = re.findall(r"LDG\.E\.U16|FFMA", body)
    assert order[:8] == ["FFMA"] * 8


def test_bitmap_more_tokens() -> None:
    code = build_bitmap(2, torch.float16, 90, quads=64)
    assert code.spills == 0 and code.shared <= SHARED_LIMIT
    loop = inner(code)
    assert not count(loop, "BAR", "STS", "LDS"), "x has the layout of the marks"
    assert count(loop, "LDG.E.64") == 2 * 2 and count(loop) <= 13 * 32
