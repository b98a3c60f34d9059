"""`llmprune pack` and `llmprune unpack`: sparse weights in fewer bytes, and back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from llmprune_eval.options import Debug, Json, Remote
from llmprune_eval.terminal import table

from llmprune.options import Overwrite
from llmprune.terminal import say

if TYPE_CHECKING:
    from llmprune.pack import Packed

Folder = Annotated[Path, typer.Argument(help="A model folder.")]
Written = Annotated[Path, typer.Option("-o", "--output", help="Folder for the result.")]
Format = Annotated[
    str,
    typer.Option("--format", help="2:4, bitmap (any zeros), or auto: 2:4 unless bitmap packs over twice as much."),
]


def pack_command(
    folder: Folder,
    output: Written,
    kind: Format = "auto",
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Store sparse weights in fewer bytes; `import llmprune`, and transformers opens the folder."""
    from llmprune.pack import pack

    done = pack(folder, output, kind, overwrite=overwrite, trust_remote_code=trust_remote_code)
    say(json.dumps(asdict(done), indent=1) if as_json else packed_text(done))


def unpack_command(
    folder: Folder,
    output: Written,
    trust_remote_code: Remote = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Store packed weights densely again, bit by bit as they were: a plain folder that loads anywhere."""
    from llmprune.pack import unpack

    layers, (before, after) = unpack(folder, output, overwrite=overwrite, trust_remote_code=trust_remote_code)
    if as_json:
        say(json.dumps({"output": str(output), "modules": layers, "files": [before, after]}, indent=1))
        return
    say(f"unpacked    {layers} layers; weight files: {before:,} bytes before, {after:,} after\nsaved       {output}")


def packed_text(done: Packed) -> str:
    """The table at the end of packing, what stayed dense, and how to open it."""
    rows = [
        (what, f"{before:,}", f"{after:,}", f"{after / before:.4f}")
        for what, (before, after) in (("packed weights", done.weights), ("all weight files", done.files))
    ]
    lines = [
        table(f"packed as {done.kind}", ("", "bytes before", "bytes after", "ratio"), rows),
        "",
        f"packed      {len(done.modules)} linear layers: {done.share:.2%} of the decoder's parameters",
        *_dense_lines(done),
        f"proof       every packed weight read back: {done.proof['weights']}{_signs(done)}",
        f"logits      {_logits(done)}",
        f"saved       {done.output}",
        f'open        import llmprune; AutoModelForCausalLM.from_pretrained("{done.output}", dtype="auto")',
    ]
    return "\n".join(lines)


def _dense_lines(done: Packed) -> list[str]:
    """What stays dense: one line for all that bear the same last name for the same reason, by the first's place."""
    names = {name: [part for part in name.split(".") if not part.isdigit()][-1] for name in done.dense}
    kinds = {name: (names[name], reason.partition(", first at")[0]) for name, reason in done.dense.items()}
    counts = Counter(kinds.values())
    lines = []
    for name, reason in done.dense.items():
        count = counts.pop(kinds[name], 0)
        if count:
            lines.append(
                f"dense       {count} x {names[name]}: {reason}" + (f" of {name}" if "first at" in reason else "")
            )
    return [*lines, "dense       everything outside the blocks: embeddings, lm_head, final norm"]


def _signs(done: Packed) -> str:
    lost = done.proof["signs_of_zeros_lost"]
    return f", but for the sign of {lost} negative zeros" if lost else " bit by bit"


def _logits(done: Packed) -> str:
    if "logits_relative_difference" not in done.proof:
        return str(done.proof["logits"])
    difference = done.proof["logits_relative_difference"]
    return f"those of the dense model on {done.proof['tokens']} tokens" + (
        f", up to {difference:.2g} of the largest" if difference else ", exactly"
    )
