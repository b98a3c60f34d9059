"""The main job on the embedded model: prune by six methods, show what each cost on a page, prove one reload."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llmprune_eval import evaluate
from llmprune_eval.loading import load_model, load_tokenizer
from llmprune_eval.result import Part
from llmprune_eval.terminal import number, table
from llmprune_eval.text import joined_windows
from torch import Tensor
from tqdm import tqdm

from llmprune.compare import check_page, write_page
from llmprune.config import PruneConfig
from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import compare
from llmprune.prune import PruneResult, prune
from llmprune.report import Report
from llmprune.structured.task import LearningOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HERE = Path(__file__).parent
METHODS = ("random", "magnitude", "wanda", "stade", "sparsegpt", "regress")
UNIT_METHODS = ("random", "wanda", "obs", "regress", "maskprune")
NONE, LEARNING = LearningOptions(), LearningOptions(steps=200, passes=20)
RUNS = [
    *[PruneConfig(method=method) for method in METHODS],
    *[PruneConfig(method=method, pattern="2:4") for method in METHODS],
    *[
        PruneConfig(
            method=method, pattern="uniform", sparsity=0.25, learning=LEARNING if method == "maskprune" else NONE
        )
        for method in UNIT_METHODS
    ],
]
PROVED = PruneConfig(method="regress", pattern="2:4")
PROMPT = "One day, Lily went to the park with her mom. She saw a"
NEW_TOKENS = 40


def stories() -> list[str]:
    """The embedded texts, in order."""
    text = (HERE / "stories.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("\n\n") if story.strip()]


def run_demo(as_json: bool, html: Path) -> str:
    """Everything the demo measures, as tables or as JSON, and as a page."""
    check_page(html)
    folder = str(HERE / "model")
    tokenizer, dense = load_tokenizer(folder), load_model(folder, "float32")
    texts, length = stories(), dense.config.max_position_embeddings
    half = len(texts) // 2
    calibration = joined_windows(texts[:half], "\n", tokenizer, length)
    held_out = joined_windows(texts[half:], "\n", tokenizer, length)
    rows = [_row("dense", "", dense, dense, held_out, tokenizer, 0.0, 0.0)]
    shown = [_candidate(rows[0], len(held_out), length)]
    logging.getLogger("llmprune").setLevel(logging.WARNING)  # the table says it all
    proved: PruneResult | None = None
    for config in tqdm(RUNS, desc="demo", disable=None, leave=False):
        start = time.perf_counter()
        done = prune(load_model(folder, "float32"), config, tokens=calibration)
        seconds = time.perf_counter() - start
        report = done.report
        rows.append(
            _row(config.method, report.pattern, done.model, dense, held_out, tokenizer, report.sparsity, seconds)
        )
        shown.append(_candidate(rows[-1], len(held_out), length, report))
        if config == PROVED:
            proved = PruneResult(done.model, report, tokenizer)
    assert proved is not None
    with tempfile.TemporaryDirectory() as scratch:
        saved = proved.save(Path(scratch, "pruned"))
        proof = json.loads((saved / "llmprune.json").read_text(encoding="utf-8"))["reload"]
        size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    write_page(html, compare(shown), "The embedded model, pruned")
    facts = {
        "page": str(html),
        "calibration_windows": len(calibration),
        "held_out_windows": len(held_out),
        "window": length,
        "rows": rows,
        "prompt": PROMPT,
        "reload": {**proof, "method": PROVED.method, "pattern": PROVED.pattern, "bytes": size},
    }
    return json.dumps(facts, indent=1) if as_json else _text(facts)


def _row(
    method: str,
    pattern: str,
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Tensor,
    tokenizer: Any,
    sparsity: float,
    seconds: float,
) -> dict[str, Any]:
    scores = evaluate(model, windows, against=dense)
    return {
        "method": method,
        "pattern": pattern,
        "sparsity": sparsity,
        "perplexity": scores.perplexity,
        "kl": scores.kl,
        "top1_agreement": scores.top1_agreement,
        "bytes": _bytes(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
        "seconds": seconds,
        "continuation": _continuation(model, tokenizer),
    }


def _bytes(model: PreTrainedModel) -> int:
    """Of the weights' files that the model makes."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return sum(file.stat().st_size for file in Path(scratch).glob("*.safetensors"))


def _candidate(row: Mapping[str, Any], windows: int, length: int, report: Report | None = None) -> Candidate:
    """A row for the page; without a report the dense model's."""
    model = str(HERE / "model")
    figures = ("perplexity",) if report is None else ("perplexity", "kl", "top1_agreement")
    text = {"text": "embedded stories, second half", "joiner": "\n", "seqlen": length, "windows": windows,
            "dtype": "float32", "against": model}  # fmt: skip
    told = [{"prompt": PROMPT, "text": row["continuation"]}]
    parts = (
        Part("perplexity", "embedded stories", text, {name: row[name] for name in figures}),
        Part("generation", "stories", {"new_tokens": NEW_TOKENS, "greedy": True}, {}, samples=told),
    )
    sizes = {key: row[key] for key in ("bytes", "parameters", "nonzero")}
    if report is None:
        return Candidate("dense", model, parts=parts, **sizes)
    manifest = {**report.as_dict(), "model": model, "saved": {**sizes, "dense_bytes": None}}
    name = f"{row['method']} {row['pattern']}"
    return Candidate.from_manifest(name, name, manifest, parts)


def _continuation(model: PreTrainedModel, tokenizer: Any) -> str:
    """What the model writes after the prompt, greedily."""
    encoded = tokenizer(PROMPT, return_tensors="pt")
    generate: Any = model.generate
    with torch.no_grad():
        ids = generate(
            encoded["input_ids"],
            attention_mask=torch.ones_like(encoded["input_ids"]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    text: str = tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def _text(facts: dict[str, Any]) -> str:
    """Two tables and the proof."""
    figures = [
        (f"{r['method']} {r['pattern']}".strip(), f"{r['sparsity']:.0%}", f"{r['perplexity']:.2f}", number(r["kl"], 3),
         f"{r['nonzero'] / 1e3:.0f} k", f"{r['bytes'] / 1e6:.2f} MB", f"{r['seconds']:.1f}")
        for r in facts["rows"]
    ]  # fmt: skip
    title = (
        f"Embedded model in float32, calibrated on {facts['calibration_windows']} windows of {facts['window']} tokens, "
        f"scored on {facts['held_out_windows']} others"
    )
    columns = ("method", "sparsity", "perplexity", "KL to dense", "non-zero", "size", "seconds")
    stories_told = [(f"{r['method']} {r['pattern']}".strip(), r["continuation"]) for r in facts["rows"]]
    reload = facts["reload"]
    lines = [table(title, columns, figures), "", f"The same prompt before and after: {facts['prompt']} ..."]
    lines += [f"\n  {name}\n    {text}" for name, text in stories_told]
    lines += [
        "",
        f"reload   {reload['method']} {reload['pattern']} saved ({reload['bytes'] / 1e6:.2f} MB) and loaded in a fresh "
        f"process by transformers alone: weights {reload['weights']}",
        "size     zeros are stored densely: the file does not shrink, and dense runtimes are not faster; uniform rows",
        "         are smaller plain models, with that share of the decoder's parameters cut out",
        f"page     {facts['page']}: everything beside each other, layer by layer, with plots; open it in a browser",
    ]
    return "\n".join(lines)
