"""Measure the kernels on the GPU at hand: `make kernels`, or python kernels/bench.py --help.

Rows are written to kernels/results.csv as they are measured, so that a run that is stopped keeps what it has. A kernel
whose answer is wrong is named and gets no figure, and the exit code is 1; without a usable GPU it is 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from llmprune_kernels.benchmark import end_to_end, rows, shapes, timing
from llmprune_kernels.benchmark.contest import Machine, Refusal, contest, half_of
from llmprune_kernels.benchmark.contestants import FEW, Contestant, of_24, of_bitmap, variants
from llmprune_kernels.benchmark.machine import commit, facts
from llmprune_kernels.benchmark.roof import Roof
from llmprune_kernels.bitmap_kernel import TOKENS as TOKENS_OF_BITMAP
from llmprune_kernels.launch import first_line, trouble

HERE = Path(__file__).resolve().parent
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
QUICK_TOKENS = (1, 16, 64, 1024)
ALL, MANY = (1, 1 << 30), (64, 1 << 30)  # rows: of the table, and of --only prefill; FEW are those of --only decode
END_TO_END_MINUTES = 2.0
LIBRARIES = ("cuBLAS", "cuSPARSELt", "CUTLASS")  # what a prefill is compared with


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench.py: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three layers, four sizes, no whole model: two minutes")
    parser.add_argument("--layers", nargs="+", help="models or layers: Llama-3-8B, Llama-3-8B:gate_up")
    parser.add_argument("--tokens", nargs="+", type=int, help="rows of x")
    parser.add_argument("--only", choices=("decode", "bitmap", "prefill", "end-to-end"), help="one part of the table")
    parser.add_argument("--tune", action="store_true", help="every variant of the decode kernel, and nothing else")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no layer after so many")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv", help="the table; rows are added or replaced")
    parser.add_argument("--commit", help="what to note as the commit where there is no repository")
    parser.add_argument("--plot", action="store_true", help="draw roof.png anew from the table, beside it")
    options = parser.parse_args(arguments)
    if options.tokens and min(options.tokens) < 1:
        parser.error(f"--tokens {min(options.tokens)}: at least 1 is needed")
    try:
        rows.read(options.out)
        names = options.layers or (list(shapes.QUICK) if options.quick else None)
        options.layers = shapes.chosen(names)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    options.tokens = sorted(set(options.tokens or (QUICK_TOKENS if options.quick else TOKENS)))
    return options


def missing() -> str | None:
    """What this machine lacks; None if it can be measured."""
    wanted = "wanted: a CUDA device of compute capability 8.0 or above and a torch built for it"
    if not torch.cuda.is_available():
        return f"found torch {torch.__version__} and no CUDA device; {wanted}"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"found {torch.cuda.get_device_name()} of capability {capability[0]}.{capability[1]}; {wanted}"
    return None


def parts(options: argparse.Namespace) -> list[tuple[str, list[Contestant], list[int]]]:
    """(form of the weight, contestants, rows) of what is to be measured at every layer."""

    def within(limits: tuple[int, int]) -> list[int]:
        return [count for count in options.tokens if limits[0] <= count <= limits[1]]

    if options.tune:
        return [("2:4", [of_24()[0], *variants()], within(FEW))]
    if options.only == "prefill":
        chosen = [one for one in of_24() if one.name.startswith(LIBRARIES) or one.name == "both"]
        return [("2:4", chosen, within(MANY))]
    return [
        *([("2:4", of_24(), within(FEW if options.only else ALL))] if options.only != "bitmap" else []),
        *([("bitmap", of_bitmap(), within((1, TOKENS_OF_BITMAP)))] if options.only in (None, "bitmap") else []),
    ]


def tables(
    options: argparse.Namespace, device: torch.device, machine: Machine, deadline: float
) -> Iterator[dict[str, Any] | Refusal]:
    """All layers, as long as there is time."""
    wanted = parts(options)
    for i, layer in enumerate(options.layers):
        if time.monotonic() > deadline:
            left = " ".join(layer.name for layer in options.layers[i:])
            print(f"bench.py: no time left; go on with --layers {left}", file=sys.stderr)
            return
        torch.manual_seed(0)
        full = torch.randn(layer.outputs, layer.inputs, device=device) / layer.inputs**0.5
        weight = full.to(getattr(torch, options.dtype))
        del full
        for form, contestants, counts in wanted:
            yield from contest(layer, half_of(weight, form), counts, contestants, machine)


def whole_model(
    options: argparse.Namespace, device: torch.device, machine: Machine
) -> Iterator[dict[str, Any] | Refusal]:
    """Decoding with a Llama of 8B parameters."""
    torch.manual_seed(0)
    model = end_to_end.build(end_to_end.LLAMA_3_8B, device, getattr(torch, options.dtype))
    name = f"Llama-3-8B, q/k/v and gate/up fused, {end_to_end.LENGTH} tokens of cache, decoding"
    yield from end_to_end.compare(model, name, "decode", (1, 16), machine.record)


def surroundings(options: argparse.Namespace, device: torch.device) -> tuple[Machine, dict[str, str]]:
    """The roof of a CUDA device, measured, and what all rows say of it."""
    roof = Roof(timing.copy_bandwidth(device), timing.launch_cost(device))
    noted = commit(HERE) if options.commit is None else options.commit
    common = facts(device, noted, " ".join(["python kernels/bench.py", *sys.argv[1:]]))
    free, _ = torch.cuda.mem_get_info(device)
    l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
    said = f"{common['gpu']}: copies at {roof.bandwidth * 1e-9:.0f} GB/s, {roof.launch:.2f} us per launch in a graph"
    print(said, flush=True)
    return Machine(timing.Graph, roof, l2, free // 4), common


def measure(options: argparse.Namespace, device: torch.device, machine: Machine, common: dict[str, str]) -> int:
    """Everything that is asked for; the exit code."""
    started = time.monotonic()
    model = options.only == "end-to-end" or not (options.quick or options.only or options.tune)
    refused = []
    if options.only != "end-to-end":
        minutes = options.minutes - (END_TO_END_MINUTES if model else 0)
        refused += keep(tables(options, device, machine, started + 60 * minutes), options.out, common)
    if model:
        refused += keep(whole_model(options, device, machine), options.out, common)
    print(f"{time.monotonic() - started:.0f} s; rows are in {options.out}")
    return 1 if refused else 0


def keep(found: Iterator[dict[str, Any] | Refusal], out: Path, common: dict[str, str]) -> list[Refusal]:
    """Write rows as they come, and show each layer when the next begins; says at once, and returns, what got no figure:
    after some errors a CUDA device does nothing more."""
    refused: list[Refusal] = []
    shown: list[dict[str, Any]] = []
    for item in found:
        if isinstance(item, Refusal):
            refused.append(item)
            why = f"{item.layer}, {item.rows} rows, {item.kernel}: {item.reason}"
            print(f"bench.py: {why}", file=sys.stderr, flush=True)
            continue
        rows.merge(out, [item | common])
        if shown and shown[-1]["layer"] != item["layer"]:
            print(rows.show(shown, shown[-1]["layer"]), flush=True)
            shown = []
        shown.append(item)
    if shown:
        print(rows.show(shown, shown[-1]["layer"]), flush=True)
    return refused


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for a wrong answer or a kernel that did not run, 2 for a machine or a request that cannot."""
    options = parse(arguments)
    lacking = missing()
    if lacking is not None:
        print(f"bench.py: {lacking}", file=sys.stderr)
        return 2
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        code = measure(options, device, *surroundings(options, device))
    except trouble() as error:
        print(f"bench.py: stopped: {first_line(error)}", file=sys.stderr)
        code = 1
    if options.plot:
        importlib.import_module("draw_roof").draw(options.out, options.out.with_name("roof.png"))
    return code


if __name__ == "__main__":
    sys.exit(main())
