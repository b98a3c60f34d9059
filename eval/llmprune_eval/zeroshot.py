"""One task of lm-eval, asked of a loaded model: the figures are lm-eval's own, by its own defaults."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerate import Accelerator, PartialState

from llmprune_eval.catalogue import Catalogue, reason
from llmprune_eval.errors import InputError, memory_ran_out
from llmprune_eval.result import Part, finite
from llmprune_eval.wanted import Opened, Wanted

SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


@dataclass(frozen=True)
class Examinee:
    """A model as lm-eval wants it."""

    opened: Opened
    batch_size: int | str

    @cached_property
    def lm(self) -> Any:
        """An HFLM that shares its requests with the other processes, if there are any."""
        from lm_eval.models.huggingface import HFLM

        tokenizer = self.opened.required_tokenizer()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {self.opened.name} has neither start nor end token: lm-eval needs one")
        lm: Any = HFLM(pretrained=self.opened.model, tokenizer=tokenizer, batch_size=self.batch_size)
        if PartialState().num_processes > 1:  # HFLM leaves this to whoever hands it a model
            lm.accelerator = Accelerator()
            lm._rank, lm._world_size = lm.accelerator.process_index, lm.accelerator.num_processes
        return lm


@dataclass(frozen=True)
class ZeroShot:
    """One task or group."""

    name: str
    examinee: Examinee
    catalogue: Catalogue
    wanted: Wanted
    kind = "task"

    @property
    def asked(self) -> dict[str, Any]:
        """The protocol as far as it is known before the task is loaded."""
        return self._asked(self.name)

    def _asked(self, name: str) -> dict[str, Any]:
        return {
            **self.catalogue.asked(name, self.wanted.num_fewshot),
            "limit": self.wanted.limit,
            "dtype": self.examinee.opened.dtype,
            "tokenizer_sha256": self.examinee.opened.tokenizer_sha256,
        }

    def measure(self) -> list[Part]:
        """The task's part, with a group those of its tasks as well; nothing on processes but the first.

        Raises:
            InputError: the task does not load or fails, or a figure is NaN.
        """
        start = time.perf_counter()
        with _quiet():
            task = self.catalogue.load(self.name)
            commits = {one.task_name: _commit(one) for one in self.catalogue.leaves(task)}
            results = self._results(task)
        if results is None:
            return []
        rows = {name: _figures(row) for name, row in results["results"].items()}
        _check(rows, results)
        seconds = time.perf_counter() - start
        parts = []
        for name, (values, errors) in rows.items():
            protocol = {"revision": commits.get(name), **_protocol(name, results), **self._asked(name)}
            parts.append(Part(self.kind, name, protocol, values, errors, seconds=seconds))
        return parts

    def _results(self, task: Any) -> dict[str, Any] | None:
        from lm_eval import simple_evaluate

        try:
            results: dict[str, Any] | None = simple_evaluate(
                model=self.examinee.lm,
                tasks=[task],
                num_fewshot=self.wanted.num_fewshot,
                limit=self.wanted.limit,
                batch_size=self.examinee.batch_size,
                task_manager=self.catalogue.manager,
            )
        except Exception as error:  # nothing narrower: templates and functions of the task raise whatever they like
            if memory_ran_out(error) or isinstance(error, InputError):
                raise
            raise InputError(f"task {self.name} failed in lm-eval ({reason(error)}): --debug shows where") from error
        return results


def _figures(row: Mapping[str, Any]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Metrics and their standard errors by name; a filter is named unless it is lm-eval's "none"."""
    values: dict[str, float | None] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # names, counts, and "N/A" for an error that cannot be had
        is_error = metric.endswith("_stderr")
        name = metric.removesuffix("_stderr") + ("" if chosen == "none" else f",{chosen}")
        if not is_error:
            values[name] = float(value)
        elif math.isfinite(value):
            errors[name] = float(value)
    return values, errors


def _check(rows: Mapping[str, tuple[dict[str, float | None], dict[str, float]]], results: Mapping[str, Any]) -> None:
    """Raise InputError for NaN, in a figure or in the likelihoods that an accuracy would hide it in."""
    advice = "the model's logits are not finite, or its weights overflow: try --dtype float32"
    for name, (values, _) in rows.items():
        for metric, value in values.items():
            if value is not None and math.isnan(value):
                raise InputError(f"task {name}: {metric} is NaN; {advice}")
            values[metric] = finite(value)
    for name, samples in results["samples"].items():
        if any(math.isnan(number) for sample in samples for number in _numbers(sample["resps"])):
            raise InputError(f"task {name}: the model's likelihoods are NaN; {advice}")


def _numbers(nested: Any) -> Iterator[float]:
    if isinstance(nested, float):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _numbers(item)


def _protocol(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval says of how it asked."""
    config = results["configs"].get(name, {})
    samples = sorted(results["samples"].get(name, []), key=lambda s: (s["doc_id"], s["filter"]))
    hashes = "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples)
    filters = sorted({key.partition(",")[2] for key in results["results"][name] if "," in key})
    return {
        "version": results["versions"].get(name),
        "dataset": _dataset(config),
        "split": config.get("test_split") or config.get("validation_split"),
        "samples": results.get("n-samples", {}).get(name, {}).get("effective"),
        "documents_sha256": hashlib.sha256(hashes.encode()).hexdigest() if hashes else None,
        "tasks": results.get("group_subtasks", {}).get(name),
        "filters": filters,
        "seeds": {seed.removesuffix("_seed"): results["config"][seed] for seed in SEEDS},
    }


def _dataset(config: Mapping[str, Any]) -> str | None:
    """Path and name, or the local files."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    parts = [config.get("dataset_path"), config.get("dataset_name"), files and str(files)]
    return " ".join(str(part) for part in parts if part) or None


def _commit(task: Any) -> str | None:
    """The Hub's commit that a loaded task's data is of, or None for other data."""
    splits = getattr(task, "dataset", None)
    for split in splits.values() if isinstance(splits, dict) else ():
        for address in getattr(getattr(split, "info", None), "download_checksums", None) or ():
            if found := re.search(r"@([0-9a-f]{40})", address):
                return found[1]
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars only where somebody looks; what lm-eval prints is no result, and what its `git` says no error."""
    seen = sys.stderr.isatty() and PartialState().is_main_process
    screen = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(screen), "w") as bars:
            os.dup2(nowhere.fileno(), 2)
            with redirect_stderr(bars if seen else io.StringIO()), redirect_stdout(sys.stderr):
                yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
