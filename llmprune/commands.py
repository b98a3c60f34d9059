"""What the sub-commands do: each loads, calls the library once, and returns text for the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from llmprune_eval import evaluate
from llmprune_eval.surroundings import versions
from llmprune_eval.text import joined_windows, open_text
from torch import Tensor
from transformers import PreTrainedModel

from llmprune import tables
from llmprune.calibration import check_dataset, check_vocabulary, window_length
from llmprune.checkpoint import check_target
from llmprune.collectives import world
from llmprune.config import PruneConfig
from llmprune.errors import InputError
from llmprune.explain import refresh
from llmprune.inspection import inspect_model
from llmprune.loading import empty_model, load_model, load_tokenizer
from llmprune.manifest import read_manifest
from llmprune.planning import make_plan, plan_as_dict
from llmprune.prune import prune, resolve_device
from llmprune.ready_windows import read_npy

log = logging.getLogger(__name__)


def run_prune(model: str, output: Path, config: PruneConfig, overwrite: bool, resume: bool, as_json: bool) -> str:
    """Prune, save on rank 0, and report."""
    check_target(output, overwrite, model)
    resolve_device(config.device)
    if config.dataset is None and config.make_recipe().needs:
        raise InputError(
            f"method {config.method} needs calibration text: pass --dataset FILE, a Hub name such as c4, or 'self'"
        )
    check_dataset(config.dataset)
    output = Path(os.path.abspath(output))  # "." has no name
    state = output.with_name(f".{output.name}.learning.safetensors")
    try:
        result = prune(model, config, state=state, resume=resume)
    except KeyboardInterrupt:
        if state.is_file():
            log.warning("%s holds what was learned so far: the same command with --resume goes on from there", state)
        raise
    if world()[0] == 0:
        result.save(output, overwrite=overwrite)
        state.unlink(missing_ok=True)
    if world()[1] > 1:
        PartialState().wait_for_everyone()
    if as_json:
        return json.dumps({"output": str(output), **result.report.as_dict()}, indent=1)
    return tables.report_text(result.report, output)


def show_plan(model: str, config: PruneConfig, as_json: bool) -> str:
    """What a run would do. The model is built from its config, without its weights."""
    check_dataset(config.dataset)
    plan = make_plan(empty_model(model, config.dtype, config.trust_remote_code), config)
    return json.dumps(plan_as_dict(plan, config), indent=1) if as_json else tables.plan_text(plan, config)


def run_eval(
    model: str,
    dataset: str,
    against: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
    *,
    max_seq_length: int | None,
    num_samples: int | None,
    batch_size: int,
) -> str:
    """Score a model, and compare it with a dense one."""
    if batch_size < 1 or (num_samples is not None and num_samples < 1):
        raise InputError("--batch-size and --num-samples must be at least 1")
    if dataset == "self":
        raise InputError(
            "--dataset self: evaluation needs text that others wrote (.txt, .jsonl, .parquet, .npy, or a Hub name)"
        )
    check_dataset(dataset, "test")
    place = resolve_device(device)
    loaded = load_model(model, dtype, trust_remote_code, place)
    if dataset.endswith(".npy"):
        windows, joiner = read_npy(Path(dataset), max_seq_length)[:num_samples], None
        window_length(loaded, windows.shape[1])
    else:
        tokenizer = load_tokenizer(model, trust_remote_code) or (against and load_tokenizer(against, trust_remote_code))
        length = window_length(loaded, max_seq_length)
        windows, joiner = _text_windows(model, tokenizer, dataset, length, num_samples)
    check_vocabulary(loaded, windows, dataset)
    dense = load_model(against, dtype, trust_remote_code, place) if against else None
    if dense is not None:
        window_length(dense, windows.shape[1])
    scores = evaluate(loaded, windows, against=dense, batch_size=batch_size)
    facts: dict[str, Any] = {"model": model, "against": against, **scores.as_dict(),
                             "protocol": _protocol(dataset, joiner, windows, loaded)}  # fmt: skip
    refresh(Path(model))
    if not as_json:
        return tables.evaluation_text(facts)
    finite = {k: None if v == math.inf else v for k, v in facts.items()}  # JSON has no infinity
    return json.dumps({**finite, "versions": versions()}, indent=1)


def _protocol(dataset: str, joiner: str | None, windows: Tensor, model: PreTrainedModel) -> dict[str, Any]:
    """What a perplexity must be quoted with; no joiner where the windows came ready."""
    count, length = windows.shape
    return {
        "dataset": dataset,
        "joiner": joiner,
        "window": length,
        "stride": length,
        "windows": count,
        "scored_tokens": count * (length - 1),
        "first_tokens": windows[0, :4].tolist(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "measure": "exp of the mean token negative log-likelihood, non-overlapping windows",
    }


def _text_windows(
    model: str, tokenizer: Any | None, dataset: str, length: int, num_samples: int | None
) -> tuple[Tensor, str]:
    """The first windows of a text, by its protocol, and what its texts are joined by."""
    if tokenizer is None:
        raise InputError(
            f"{model} has no tokenizer: copy the dense model's tokenizer files into it, or pass .npy windows"
        )
    source = open_text(dataset, "test")
    texts = source.read(length * num_samples) if num_samples else list(source.texts)
    windows = joined_windows(texts, source.protocol.joiner, tokenizer, length)[:num_samples]
    if not len(windows):
        raise InputError(f"{dataset} is shorter than one window of {length} tokens: use a smaller --max-seq-length")
    return windows, source.protocol.joiner


def run_inspect(folder: str, as_json: bool) -> str:
    """Sparsity and pattern of every site of a saved model, and its manifest."""
    manifest = read_manifest(Path(folder))
    facts = inspect_model(load_model(folder))
    if as_json:
        return json.dumps({"folder": folder, **facts, "manifest": manifest}, indent=1)
    return tables.inspection_text(folder, facts, manifest)
