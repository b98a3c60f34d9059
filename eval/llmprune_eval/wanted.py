"""What one evaluation is asked for, and the model that it is asked of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from llmprune_eval.devices import resolve_device
from llmprune_eval.errors import InputError
from llmprune_eval.hashing import fingerprint
from llmprune_eval.loading import load_config, load_model, load_tokenizer
from llmprune_eval.result import weights_sha256
from llmprune_eval.windows import check_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel


AUTO = "auto"


@dataclass(frozen=True)
class Wanted:
    """The options of one evaluation.

    Attributes:
        model: folder or Hub name.
        dataset: text or ready windows to compute perplexity on, or None.
        against: the dense model, for divergence from it on that text, or None.
        max_seq_length: tokens per window; None means min(2048, positions).
        num_samples: only the first so many windows.
        tasks: names that lm-eval knows: tasks, groups, tags, or patterns of them.
        num_fewshot: examples before a question; None means the task's own.
        limit: documents of a task at most, or below 1 their share.
        include_path: folders with the user's own task YAMLs.
        prompts: to be continued greedily.
        max_new_tokens: of a continuation; None means 64, or what the model's positions allow.
        batch_size: at most, or "auto": as large as memory allows.
        device_map: "auto" to spread the model over several devices, or None.
    """

    model: str
    dataset: str | None = None
    against: str | None = None
    max_seq_length: int | None = None
    num_samples: int | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    batch_size: int | str = 8
    device: str = AUTO
    device_map: str | None = None
    dtype: str = AUTO
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise InputError for what makes no sense, before anything is loaded."""
        if not (self.dataset or self.tasks or self.prompts):
            raise InputError("nothing to measure was asked for: pass --dataset, --tasks, --suite or --generate")
        if self.against and not (self.dataset or self.prompts):
            raise InputError("--against compares two models on a text: pass --dataset or --generate as well")
        if self.dataset == "self":
            raise InputError(
                "--dataset self: evaluation needs text that others wrote (.txt, .jsonl, .parquet, .npy, or a Hub name)"
            )
        if self.batch_size != AUTO and not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise InputError(f"--batch-size {self.batch_size}: give a number of at least 1, or auto")
        for option, value in (("--num-samples", self.num_samples), ("--max-new-tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: give a number of at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"--num-fewshot {self.num_fewshot}: give 0 or more")
        if self.limit is not None and not 0 < self.limit < float("inf"):
            raise InputError(f"--limit {self.limit}: give a number of documents, or a share below 1")
        if self.device_map not in (None, AUTO):
            raise InputError(f"--device-map {self.device_map}: only auto is known")
        check_dataset(self.dataset, "test")


@dataclass(frozen=True)
class Opened:
    """A loaded model with what is needed to ask it something."""

    name: str
    model: PreTrainedModel
    tokenizer: Any | None

    @classmethod
    def of(cls, name: str, wanted: Wanted) -> Opened:
        """Load a model by the options of an evaluation.

        Raises:
            InputError: it does not load.
        """
        place: torch.device | None = resolve_device(wanted.device)
        if wanted.device_map is not None:
            if PartialState().num_processes > 1:
                raise InputError("--device-map auto spreads one model over all GPUs: start one process only")
            place = None
        model = load_model(name, wanted.dtype, wanted.trust_remote_code, place, wanted.device_map)
        return cls(name, model, load_tokenizer(name, wanted.trust_remote_code))

    @property
    def dtype(self) -> str:
        """Of the weights, without "torch."."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def tokenizer_sha256(self) -> str | None:
        """By what the tokenizer is known again: its vocabulary, and what it makes of a text."""
        return None if self.tokenizer is None else fingerprint(self.tokenizer)

    def required_tokenizer(self) -> Any:
        """Raise InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer: copy the dense model's tokenizer files into it, or pass .npy windows"
            )
        return self.tokenizer


@dataclass(frozen=True)
class Reference:
    """The dense model of an evaluation, if it has one; loaded when first needed."""

    wanted: Wanted

    @cached_property
    def model(self) -> PreTrainedModel | None:
        """Raise InputError if it does not load."""
        against = self.wanted.against
        return Opened.of(against, self.wanted).model if against is not None else None

    @cached_property
    def sha256(self) -> str | None:
        """By which it is known: hash of its weights, or the Hub's commit."""
        against = self.wanted.against
        if against is None:
            return None
        config = load_config(against, self.wanted.trust_remote_code)
        commit: str | None = getattr(config, "_commit_hash", None)
        return weights_sha256(Path(against)) if Path(against).is_dir() else commit
