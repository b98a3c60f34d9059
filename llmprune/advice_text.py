"""What `llmprune plan` shows in the terminal."""

from __future__ import annotations

from llmprune_eval.terminal import table

from llmprune.advice import Advice
from llmprune.outlook import PACKED, Needs, Outlook
from llmprune.tables import skipped_lines, widths_lines

BASIS = (
    "expected    speeds are expectations, counted and not measured on this model (`llmprune bench` measures):",
    "            zeros       none: dense kernels multiply them like other numbers, and the file stores them (and the",
    "                        biases that some methods add)",
    f"            2:4         `llmprune pack` stores a weight of 16 bits in {PACKED} of its bytes: no more than 1.78x",
    "                        at the packed layers where reading them takes the time (decoding), on an NVIDIA GPU",
    "                        of Ampere or later; a bound from the bytes",
    "            uniform     by the parameters that a token has to read; a random Llama of 25.7 M parameters read",
    "                        1.73x and wrote 1.28x as fast for 1.85x fewer (eval/results/smaller.csv, two CPU cores)",
)


def advice_text(advice: Advice) -> str:
    """Two tables, what is skipped, the bases of what is expected, and the commands."""
    title = (
        f"{advice.model}: {advice.architecture}, {advice.dtype}, {advice.model_parameters:,} parameters "
        f"({size(advice.size)}), {advice.decoder_parameters:,} of them in {advice.blocks} blocks"
    )
    lines = [table(title, ("pattern", "prunes", "file", "faster"), map(_pattern_row, advice.patterns)), ""]
    lines += [f"impossible  {one.pattern}: {one.problem}" for one in advice.patterns if one.problem]
    lines += skipped_lines(advice.skipped)
    lines += [line for one in advice.patterns if not one.problem and "uniform" in one.pattern for line in _units(one)]
    return "\n".join([*lines, *BASIS, "", *_needs_lines(advice), "", *_recommendations(advice)])


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _pattern_row(one: Outlook) -> tuple[str, ...]:
    if one.problem:
        return one.pattern, "-", "-", "impossible, see below"
    file, faster = f"{size(one.size)}", "no"
    if one.packed is not None and one.packed_speedup is not None:
        file += f" (packed {size(one.packed)})"
        faster += f" (packed: at most {one.packed_speedup:.2f}x)"
    if one.speedup > 1:
        faster = f"up to {one.speedup:.2f}x anywhere"
    return one.pattern, f"{'' if one.exact else 'about '}{one.removed:.2%} of the decoder", file, faster


def _units(one: Outlook) -> list[str]:
    """What uniform cuts and leaves alone, or that this was not looked into."""
    if one.widths is None:
        return [
            "widths      uniform: the share is met to within one unit; the exact widths take a real block in float32:",
            "            `llmprune prune MODEL --pattern uniform --dry-run`",
        ]
    return widths_lines(one.widths, "uniform: ")


def _needs_lines(advice: Advice) -> list[str]:
    machine = advice.machine
    there = f"{size(machine.memory)}"
    if machine.gpu:
        there += f" and {machine.gpu} with {size(machine.gpu_memory)}"
    title = f"Needed, with {advice.windows} windows of {advice.seqlen} tokens; this machine has {there}"
    rows = [(one.method, _patterns(one), f"{one.passes:.2f}", _memory(one), one.verdict) for one in advice.methods]
    return [
        table(title, ("method, best first", "patterns", "passes", "memory", "here"), rows),
        "",
        "passes      forward passes of the decoder over the windows",
        "memory      counted, without the libraries; measured peaks were 1.5 to 2.1 times as high: more than half",
        "            of what is there is called close (eval/results/bench.csv)",
    ]


def _patterns(one: Needs) -> str:
    return "uniform" if one.pattern == "uniform" else "unstructured, 2:4"


def _memory(one: Needs) -> str:
    return f"{size(one.memory)}" + (f" + {size(one.gpu_memory)} GPU" if one.gpu_memory else "")


def _recommendations(advice: Advice) -> list[str]:
    lines = []
    for one in advice.recommendations:
        lines.append(f"{one.goal:<11} {one.why}")
        lines += [f"            {one.command}"] * (one.command is not None)
    return lines
