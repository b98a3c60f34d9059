"""The model card of a pruned model: nothing in it that was not measured."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from yaml import YAMLError

from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import Comparison
from llmprune.pages.figures import size
from llmprune.pages.grids import Grid
from llmprune.pages.page import HERE, calibration, figure_grids, widths

CARD = "README.md"
BEGIN, END = "<!-- llmprune: results -->", "<!-- llmprune: end of results -->"
"""Around what new measurements rewrite; everything else belongs to the user."""


def card_text(folder: Path, one: Candidate, comparison: Comparison) -> str:
    """The whole card of a folder that is being written."""
    assert one.manifest is not None
    manifest = one.manifest
    command = str(manifest.get("command") or "")
    card = ModelCard.from_template(
        _metadata(manifest),
        template_path=str(HERE / "card.md"),
        name=one.name,
        manifest={**manifest, "command": command or "the command was not kept"},
        pruned=_pruned(manifest),
        widths=widths(manifest),
        calibration=calibration(manifest),
        biases=manifest["bias_flags"],
        gain=_gain(one),
        results=results_section(comparison),
        load=_load(folder, one.name, manifest),
        packed=manifest.get("packed"),
        language="bash" if command.startswith("llmprune ") else "python",
        versions=", ".join(f"{name} {value}" for name, value in manifest["versions"].items()),
    )
    return str(card).rstrip() + "\n"


def results_section(comparison: Comparison) -> str:
    """The part between the marks: every figure beside the dense model's, and its protocol."""
    lines = [BEGIN, "## Results", ""]
    grids = figure_grids(comparison, "perplexity", "task", "speed", "generation")
    if not grids:
        lines += ["Nothing was measured. `llmprune eval` does it, and writes it here.", ""]
    for grid in grids:
        lines += [*_markdown(grid), ""]
    lines += [f"{i}. {_cell(column.heading)}: `{_code(json.dumps(column.protocol, default=str))}`"
              for i, column in enumerate(comparison.columns, start=1)]  # fmt: skip
    return "\n".join([*lines, END])


def renewed(card: str, section: str) -> str:
    """A card with a new section of results; as it was if its marks are gone."""
    before, begun, rest = card.partition(BEGIN)
    _, ended, after = rest.partition(END)
    return before + section + after if begun and ended else card


def _metadata(manifest: dict[str, Any]) -> ModelCardData:
    """The card's head; what nobody knows is left out."""
    base = str(manifest["model"])
    on_hub = not os.path.exists(base) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
    tags = ["llmprune", "pruned", str(manifest["config"]["method"])]
    tags.append("structured-pruning" if manifest["widths"] else "sparse")
    tags += ["packed"] * bool(manifest.get("packed"))
    return ModelCardData(
        base_model=base if on_hub else None,
        license=_license(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )


def _license(base: str) -> str | None:
    """Of the base model, from its card in its folder or in the Hub's cache."""
    path: Any = Path(base, CARD)
    if not os.path.isdir(base):
        path = try_to_load_from_cache(base, CARD) if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    head = re.match(r"\s*---\n(.*?)\n---", Path(path).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if head is None:
        return None
    try:
        found = ModelCard(head.group(0), ignore_metadata_errors=True).data.get("license")
    except (YAMLError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _pruned(manifest: dict[str, Any]) -> str:
    share = f"{manifest['decoder_share']:.2%} of the decoder, {manifest['model_share']:.2%} of the model"
    if manifest["widths"]:
        return f"{manifest['pruned']:,} parameters were cut out: {share}"
    kept = re.fullmatch(r"(\d+):(\d+)", str(manifest["pattern"]))
    words = f" ({kept[1]} of every {kept[2]} consecutive input weights are kept)" if kept else ""
    sites = f"{manifest['sparsity']:.2%} of those at pruned sites"
    return f"{manifest['pruned']:,} weights were set to zero: {sites}, {share}{words}"


def _gain(one: Candidate) -> str:
    """What the pattern is good for; sizes as they are on the disk."""
    assert one.manifest is not None
    dense = one.manifest["saved"]["dense_bytes"]
    files = f"{size(one.bytes)} of weights" + (f", {size(dense)} before" if dense else "")
    if one.manifest["widths"]:
        before = one.manifest["model_parameters"]
        return f"A smaller ordinary model: {one.parameters:,} parameters, {before:,} before; {files}."
    packed = one.manifest.get("packed")
    if packed:
        before, after = packed["weights"]
        return (
            f"The weights of {len(packed['modules'])} linear layers, {packed['share']:.2%} of the decoder, are stored "
            f"packed as {packed['kind']}: {size(after)} for {size(before)} ({after / before:.4f}). All files: "
            f"{size(packed['files'][1])}, {size(packed['files'][0])} with the zeros stored."
        )
    use = "for a format or a runtime that uses it" + (
        ", such as `llmprune pack`" if one.manifest["pattern"] == "2:4" else ""
    )
    return (
        f"Pruned weights are stored as zeros ({files}): the file does not shrink, and dense runtimes are not faster. "
        f"The sparsity is there {use}."
    )


def _load(folder: Path, name: str, manifest: dict[str, Any]) -> str:
    """Code that opens the folder."""
    tokenizer = any(folder.glob("tokenizer*"))
    trust = ", trust_remote_code=True" if manifest["config"].get("trust_remote_code") else ""
    lines = ["import llmprune  # tells transformers how to open packed weights"] * bool(manifest.get("packed"))
    lines += [f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * tokenizer}", ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, dtype="auto"{trust})')
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)}{trust})"] * tokenizer
    return "\n".join(lines)


def _markdown(grid: Grid) -> list[str]:
    """A table, with the number of each column's protocol."""
    heads = [_cell(name) + (f" [{note}]" if note else "") for name, note in zip(grid.columns, grid.notes, strict=True)]
    rows = [list(map(_cell, row)) for row in grid.rows]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)]


def _cell(text: str) -> str:
    """Text within a table of Markdown."""
    return re.sub(r"([|<>`*_\[\]\\])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text within back-ticks."""
    return text.replace("`", "'")
