"""The decode kernel: in Triton's interpreter with its assembly emulated, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import machine_code
import pytest
import torch
from interpreted import answer
from llmprune_kernels import decode, selftest
from llmprune_kernels.decode import VARIANTS, Variant, default_variant

pytest.importorskip("triton", reason="Triton is not installed")

Case = tuple[int, int, int, str, tuple[int, int, int, bool], bool, bool]

# rows, inputs, tokens, dtype, (warps, row warps, row tiles, wide), bias, small integers
CASES: list[Case] = [
    (16, 256, 1, "bfloat16", (1, 1, 1, False), False, True),
    (16, 256, 8, "float16", (1, 1, 1, True), True, True),
    (37, 331, 5, "bfloat16", (2, 1, 1, False), True, True),
    (37, 331, 5, "float16", (4, 2, 2, True), False, True),
    (16, 8, 1, "bfloat16", (2, 1, 1, False), False, True),
    (16, 1032, 1, "bfloat16", (4, 2, 1, False), False, True),
    (20, 1032, 3, "bfloat16", (4, 2, 1, True), False, True),
    (70, 516, 16, "bfloat16", (4, 4, 2, True), True, True),
    (48, 1030, 13, "float16", (8, 4, 1, False), False, True),
    (33, 1030, 33, "bfloat16", (2, 2, 2, True), True, True),
    (17, 257, 64, "float16", (2, 1, 2, True), True, True),
    (48, 1024, 3, "bfloat16", (4, 2, 1, True), True, False),
    (20, 768, 2, "float16", (2, 1, 1, False), False, False),
]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The largest error of each case, from a process in which Triton interprets."""
    said = answer(Path(__file__).with_name("interpreted_decode.py"), CASES)
    lines = [json.loads(line) for line in said.splitlines()]
    return {json.dumps(line["case"]): line["error"] for line in lines}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_computes_the_product(case: Case, errors: dict[str, float]) -> None:
    error = errors[json.dumps(case)]
    assert error <= (0.0 if case[-1] else 1e-4)  # float32 sums of at most a thousand products of about 1


def test_the_self_test_knows_right_from_wrong(errors: dict[str, float]) -> None:
    """The same process ran it on the kernel as it is, and on one that gets the positions of every other tile wrong."""
    assert errors["[]"] == 0.0
    assert errors["[0]"] == len(decode.CUTS)


def build(
    variant: Variant, tokens: int, dtype: str = "bf16", whole: bool = True, arch: int = 90, ones: tuple[str, ...] = ()
) -> Any:
    """`ones`: sizes that are 1, which a launch makes a constant."""
    from llmprune_kernels.triton_kernels.mma_sp import decode_kernel

    number = {"bf16": "*bf16", "fp16": "*fp16"}[dtype]
    tensors = {"fragments": "*i32", "metadata": "*i32", "x": "*i32", "bias": number, "out": number}
    names = ("tokens", "out_features", "row_tiles", "blocks", "words", "x_stride", "out_stride", "zero")
    sizes = {name: "i32" for name in names if name not in ones}
    constants = decode.constants(variant, tokens, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype], whole, True)
    aligned = [*tensors, *(name for name in ("out_features", "words", "x_stride", "out_stride") if name in sizes)]
    constants |= dict.fromkeys(ones, 1)
    return machine_code.build(decode_kernel, {**tensors, **sizes}, constants, aligned, variant.warps, arch, 1)


CUTS = [(tokens, variant) for tokens, *both in decode.CUTS for variant in dict.fromkeys(both)]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("tokens", "variant"), CUTS, ids=str)
def test_machine_code_of_what_layers_run(tokens: int, variant: Variant, arch: int) -> None:
    check(build(variant, tokens, arch=arch), variant, tokens)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in dict(CUTS).values()], ids=str)
def test_machine_code_of_the_other_variants(variant: Variant) -> None:
    check(build(variant, 32, dtype="fp16", whole=False), variant, 32)


def check(code: Any, variant: Variant, tokens: int) -> None:
    """Sparse products, wide loads, nothing in memory that belongs in registers, a thread to every row."""
    products = 8 * variant.row_tiles * decode.token_tiles(tokens)
    assert machine_code.count(code.opcodes, "HMMA.SP.16832.F32") == products
    assert machine_code.count(code.opcodes, "HMMA", "HGMMA") == products
    weights = sum(n for name, n in code.opcodes.items() if re.match(r"LDG\.E\.EF.*\.128", name))
    assert weights == 8 * variant.row_tiles
    positions_and_x = sum(n for name, n in code.opcodes.items() if re.match(r"LDG\.E(?!\.EF).*\.128", name))
    assert positions_and_x == variant.row_tiles + (8 * decode.token_tiles(tokens) if variant.wide else 0)
    assert code.spills == 0 and code.registers <= 255
    (loop,) = [body for body in code.loops if machine_code.count(body, "HMMA")]
    assert not machine_code.count(loop, "BAR", "STS", "LDS"), "no barrier and no shared memory inside the loop"
    order = re.findall(r"\b(LDG\.E|HMMA\.SP)", code.sass)
    assert order.index("HMMA.SP") >= 8 * variant.row_tiles + 8, "all weights are under way before the first product"
    layouts = dict(re.findall(r"#(\w+) = #ttg.blocked<(.*?)>", code.ttgir))
    used = set(re.findall(r"elementwise_inline_asm.*->\s*tensor<[^,>]*, #(\w+)>", code.ttgir))
    assert used
    for name in used:
        assert "threadsPerWarp = [32, 1]" in layouts[name]
        assert f"warpsPerCTA = [{variant.warps}, 1]" in layouts[name]


def test_cuts_are_for_all_numbers_of_tokens() -> None:
    assert [tokens for tokens, *_ in decode.CUTS] == sorted({tokens for tokens, *_ in decode.CUTS})
    for tokens in range(1, decode.ROWS + 1):
        for row_tiles in (1, decode.LARGE - 1, decode.LARGE, 10_000):
            variant = default_variant(tokens, row_tiles)
            limit, few, large = next(cut for cut in decode.CUTS if tokens <= cut[0])
            assert variant == (few if row_tiles < decode.LARGE else large) and tokens <= limit


def test_sizes_of_one_are_constants_to_a_launch() -> None:
    code = build(default_variant(1, 1), 1, whole=False, ones=("out_features", "row_tiles", "blocks", "out_stride"))
    assert not code.spills


def test_a_device_without_the_instruction_is_not_asked() -> None:
    assert not selftest.mma_sp_works(torch.device("cpu"), torch.bfloat16)
    assert not selftest.mma_sp_works(torch.device("cuda"), torch.float32)
