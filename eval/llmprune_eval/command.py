"""`llmprune eval`, which is also `python -m llmprune_eval`: options in, tables or JSON out."""

from __future__ import annotations

import json

from llmprune_eval.errors import InputError
from llmprune_eval.generation import PROMPTS
from llmprune_eval.options import (
    Against,
    AutoBatch,
    Dataset,
    Debug,
    Device,
    DeviceMap,
    Dtype,
    Generate,
    Include,
    Json,
    Length,
    Limit,
    Model,
    NewTokens,
    Prompts,
    Remote,
    ResultFile,
    Shots,
    SuiteName,
    Tasks,
    Windows,
)
from llmprune_eval.run import Evaluation
from llmprune_eval.suites import suite as named_suite
from llmprune_eval.tables import evaluation_text, mean_acc
from llmprune_eval.terminal import say
from llmprune_eval.wanted import AUTO, Wanted


def eval_command(
    model: Model,
    dataset: Dataset = None,
    against: Against = None,
    max_seq_length: Length = None,
    num_samples: Windows = None,
    tasks: Tasks = None,
    suite: SuiteName = None,
    num_fewshot: Shots = None,
    limit: Limit = None,
    include_path: Include = None,
    generate: Generate = False,
    prompt: Prompts = None,
    max_new_tokens: NewTokens = None,
    batch_size: AutoBatch = "8",
    output: ResultFile = None,
    device: Device = AUTO,
    device_map: DeviceMap = None,
    dtype: Dtype = AUTO,
    trust_remote_code: Remote = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity by the papers' protocol, divergence from a dense model, lm-eval's tasks, a look at what it writes."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if suite is not None:
        chosen = named_suite(suite)
        names, dataset = [*chosen.tasks, *names], dataset or chosen.dataset
    evaluation = Evaluation(
        Wanted(
            model,
            dataset,
            against,
            max_seq_length,
            num_samples,
            tuple(names),
            num_fewshot,
            limit,
            tuple(include_path or ()),
            tuple(prompt or (PROMPTS if generate else ())),
            max_new_tokens,
            _batch_size(batch_size),
            device,
            device_map,
            dtype,
            trust_remote_code,
        ),
        output,
    )
    try:
        for _ in evaluation.run():
            pass
    finally:  # what is finished is shown, whatever came after it
        if evaluation.parts:
            say(_shown(evaluation, as_json))


def _shown(evaluation: Evaluation, as_json: bool) -> str:
    model, path = str(evaluation.result.model["name"]), evaluation.result.path
    if as_json:
        facts = evaluation.as_dict() | {"result_file": path and str(path)}
        mean = mean_acc(evaluation.parts, evaluation.names)
        return json.dumps(facts if mean is None else {**facts, "mean acc": mean}, indent=1)
    text = evaluation_text(model, evaluation.parts, evaluation.names)
    return text if path is None else f"{text}\n\nkept in           {path}"


def _batch_size(text: str) -> int | str:
    if text == AUTO:
        return text
    if not text.removeprefix("-").isdecimal():
        raise InputError(f"--batch-size {text}: give a number of at least 1, or auto")
    return int(text)
