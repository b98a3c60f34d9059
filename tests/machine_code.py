"""Triton kernels built for a GPU that is not there, and what their machine code says.

The Triton wheel brings ptxas, cuobjdump and nvdisasm, so registers, spills and every instruction can be read on a
machine without a GPU or a driver. Kernels that the interpreter holds (TRITON_INTERPRET=1) cannot be built.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
LABEL = re.compile(r"^(\.L\w+):")
BRANCH = re.compile(r"\bBRA\S*\s.*\((\.L\w+)\)")
SHARED_LIMIT = 99 * 1024  # bytes that a block may have on sm_86, 89 and 120; sm_80 has 163 KB, sm_90 and 100 have 227


@dataclass(frozen=True)
class MachineCode:
    """A kernel as the GPU would run it.

    Attributes:
        registers: 32-bit registers per thread.
        spills: bytes of stack per thread; 0 where all values stay in registers.
        shared: bytes of shared memory per block.
        sass: the listing by nvdisasm.
        ttgir: Triton's last representation that still has layouts.
    """

    registers: int
    spills: int
    shared: int
    sass: str
    ttgir: str

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the listing, with its modifiers: {"LDG.E.128.CONSTANT": 4, ...}."""
        return Counter(_opcodes(self.sass))

    @cached_property
    def loops(self) -> list[Counter[str]]:
        """The same for the body of each loop, in the order of their ends; an outer loop holds its inner ones too."""
        seen: dict[str, int] = {}
        bodies = []
        lines = self.sass.splitlines()
        for i, line in enumerate(lines):
            if label := LABEL.match(line):
                seen[label[1]] = i
            elif (branch := BRANCH.search(line)) and branch[1] in seen:
                body = lines[seen[branch[1]] : i + 1]
                if len(body) > 3:  # the endless jump to itself that pads every kernel is none
                    bodies.append(Counter(_opcodes("\n".join(body))))
        return bodies


def count(opcodes: Mapping[str, int], *beginnings: str) -> int:
    """Instructions whose name begins with one of `beginnings`, "LDG" or "LDG.E.128"; all of them without any."""
    return sum(n for name, n in opcodes.items() if not beginnings or name.startswith(beginnings))


def build(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    num_warps: int,
    arch: int,
    num_stages: int = 3,
) -> MachineCode:
    """Compile a @triton.jit function for one GPU architecture.

    Args:
        kernel: the function.
        signature: its arguments that are no constants: {"x": "*bf16", "rows": "i32"}.
        constants: its tl.constexpr arguments.
        aligned: arguments, of `signature`, that 16 divides; a launch finds that out by itself, and loads are as wide
            as in a launch only where it is said here.
        num_warps: warps per block.
        arch: 80, 86, 89, 90, 100 or 120.
        num_stages: of software pipelining.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = kernel.arg_names
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    assert set(types) == set(names), sorted(set(types) ^ set(names))
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    # Fused multiply-adds are asked for by name: Triton 3.9 warns where they are left to the default.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read(compiled)


def _read(compiled: Any) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return MachineCode(int(found[1]), int(found[2]), int(compiled.metadata.shared), sass, compiled.asm["ttgir"])


def _tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools in the Triton wheel says."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _opcodes(sass: str) -> list[str]:
    return [found[1] for line in sass.splitlines() if (found := INSTRUCTION.match(line))]
