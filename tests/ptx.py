"""A warp's instructions, as the PTX manual words them, on arrays: enough to run the decode kernel's assembly on a CPU.

Written from the manual's pictures of who holds what, lane by lane, and not from the packing code that it tests.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

LANES = 32
LANE = np.arange(LANES)[:, None]
Words = np.ndarray[Any, np.dtype[Any]]


def run(assembly: str, constraints: str, operands: list[Words]) -> list[Words]:
    """Run one piece of assembly in every warp.

    Args:
        assembly: instructions, with $0, $1, ... for the operands.
        constraints: one per operand, outputs first and marked by "=".
        operands: the inputs, each [threads, registers], 32-bit; threads in order, 32 to a warp.

    Returns:
        The outputs' registers, uint32 [threads], in order.
    """
    kinds = constraints.split(",")
    outputs = [i for i, kind in enumerate(kinds) if kind.startswith("=")]
    columns = [operand[:, i] for operand in operands for i in range(operand.shape[1])]
    assert len(columns) == len(kinds) - len(outputs), "as many registers as the constraints say"
    registers: dict[str, Words] = {}
    for i, column in enumerate(columns, start=len(outputs)):
        registers[f"${i}"] = np.ascontiguousarray(column).view(np.uint32).copy()
    threads = len(columns[0])
    for line in re.split(r"[;\n]", assembly):
        if line.strip() and not re.fullmatch(r"\s*([{}]|\.reg .*)\s*", line):
            _step(line.strip(), registers, threads)
    return [registers[f"${i}"] for i in outputs]


def _step(line: str, registers: dict[str, Words], threads: int) -> None:
    """One instruction in all threads."""
    name, rest = line.split(maxsplit=1)
    args = [part.strip() for part in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if part.strip()]

    def value(arg: str) -> Words:
        if arg == "%laneid":
            return np.arange(threads, dtype=np.uint32) % LANES
        return registers[arg] if arg in registers else np.full(threads, int(arg, 0), dtype=np.uint32)

    if name == "mov.u32":
        registers[args[0]] = value(args[1])
    elif name == "and.b32":
        registers[args[0]] = value(args[1]) & value(args[2])
    elif name == "setp.eq.u32":
        registers[args[0]] = value(args[1]) == value(args[2])
    elif name == "selp.b32":
        registers[args[0]] = np.where(registers[args[3]], value(args[1]), value(args[2]))
    elif name == "shfl.sync.bfly.b32":
        assert args[3:] == ["31", "0xffffffff"], "the whole warp takes part"
        partner = np.arange(threads) ^ int(args[2])
        registers[args[0]] = value(args[1])[partner]
    elif name.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."):
        _mma(name.split(".")[-2], args, registers, threads)
    else:
        raise AssertionError(f"not an instruction of the decode kernel: {line}")


def _mma(dtype: str, args: list[str], registers: dict[str, Words], threads: int) -> None:
    """D [16, 8] = A [16, 32] (2:4) times B [32, 8] plus C, in every warp, sums in float64."""
    d, a, b, c = ([name.strip() for name in arg[1:-1].split(",")] for arg in args[:4])
    metadata, selector = registers[args[4]].reshape(-1, LANES), int(args[5], 0)
    dense = _sparse_operand(_halves(registers, a, dtype), metadata, selector)
    group, part = LANE // 4, LANE % 4
    i = np.arange(8)  # b_i
    other = np.zeros((len(metadata), 32, 8))
    other[:, 2 * part + i % 2 + 8 * (i // 2), group] = _halves(registers, b, dtype)
    i = np.arange(4)  # c_i and d_i
    sums = np.zeros((len(metadata), 16, 8))
    row, column = group + 8 * (i // 2), 2 * part + i % 2
    sums[:, row, column] = np.stack([registers[name].view(np.float32).reshape(-1, LANES) for name in c], axis=2)
    total = (sums + dense @ other)[:, row, column].astype(np.float32)
    for k, name in enumerate(d):
        registers[name] = total[:, :, k].reshape(threads).view(np.uint32)


def _sparse_operand(pairs: Words, metadata: Words, selector: int) -> Words:
    """A [warps, 16, 32]: what every lane keeps, at the places that the metadata names."""
    group, part, i = LANE // 4, LANE % 4, np.arange(8)  # a_i
    row = group + 8 * (i // 2 % 2)
    kept = 2 * part + i % 2 + 8 * (i // 4)
    # Two of every four lanes hold the positions: the first for kept columns 0 to 7, the second for 8 to 15; in each
    # the low half for the upper row, the high half for the lower row, two bits for every kept column in turn.
    holder = 4 * group + 2 * selector + kept // 8
    place = metadata[:, holder] >> (16 * (row // 8) + 2 * (kept % 8)).astype(np.uint32) & 3
    assert (place[:, :, 0::2] < place[:, :, 1::2]).all(), "ordered metadata: the first place before the second"
    dense = np.zeros((len(metadata), 16, 32))
    warp = np.arange(len(metadata))[:, None, None]
    dense[warp, row, 4 * (kept // 2) + place] = pairs
    return dense


def _halves(registers: dict[str, Words], names: list[str], dtype: str) -> Words:
    """Registers of two 16-bit numbers each, as [warps, 32 lanes, 2 * registers], the low half first."""
    words = np.stack([registers[name] for name in names], axis=1)
    bits = np.stack([words & 0xFFFF, words >> 16], axis=2).reshape(-1, LANES, 2 * len(names))
    if dtype == "bf16":
        return (bits << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)
