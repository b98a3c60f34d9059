"""Perplexity on one text by the papers' protocol, and divergence from a dense model, as a part of a result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import find_executable_batch_size
from torch import Tensor

from llmprune_eval.errors import InputError
from llmprune_eval.evaluate import Evaluation, evaluate
from llmprune_eval.hashing import fingerprint, sha256_of_files
from llmprune_eval.loading import load_tokenizer
from llmprune_eval.ready_windows import digest, read_npy
from llmprune_eval.result import Part, finite
from llmprune_eval.text import TextSource, joined_windows, open_text
from llmprune_eval.wanted import Opened, Reference, Wanted
from llmprune_eval.windows import check_vocabulary, window_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LARGEST_BATCH = 64
MEASURE = "exp of the mean token negative log-likelihood, non-overlapping windows"


@dataclass(frozen=True)
class Perplexity:
    """One text, one model, and the dense one if there is any."""

    opened: Opened
    wanted: Wanted
    reference: Reference
    kind = "perplexity"

    @property
    def name(self) -> str:
        """The dataset, as it was asked for."""
        return str(self.wanted.dataset)

    @property
    def _source(self) -> TextSource | None:
        """The text, or None where windows come ready."""
        return None if self.name.endswith(".npy") else open_text(self.name, "test")

    @cached_property
    def asked(self) -> dict[str, Any]:
        """The protocol as far as it is known before a token is read."""
        source, length = self._source, self.wanted.max_seq_length
        ready = source is None
        seqlen = read_npy(Path(self.name), length).shape[1] if ready else length
        return {
            "dataset": self.name,
            "revision": sha256_of_files([Path(self.name)]) if source is None else source.revision(),
            "split": source and source.split,
            "joiner": source and source.protocol.joiner,
            "seqlen": window_length(self.opened.model, seqlen),
            "limit": self.wanted.num_samples,
            "dtype": self.opened.dtype,
            "tokenizer_sha256": None if ready else fingerprint(self._tokenizer),
            "against_sha256": self.reference.sha256,
        }

    def measure(self) -> list[Part]:
        """The part, on every process the same.

        Raises:
            InputError: no tokenizer, too little text, other vocabularies, logits that are not finite.
        """
        start = time.perf_counter()
        asked, model = self.asked, self.opened.model
        windows = self._windows(asked["seqlen"])
        check_vocabulary(model, windows, self.name)
        dense = self.reference.model
        if dense is not None:
            window_length(dense, windows.shape[1])
        scores = self._scores(windows, dense)
        protocol = {
            **asked,
            "stride": windows.shape[1],
            "windows": len(windows),
            "tokens": scores.tokens,
            "tokens_sha256": digest(windows),
            "bos": self._bos(windows),
            "against": self.wanted.against,
            "measure": MEASURE,
        }
        values = {k: finite(v) for k, v in scores.as_dict().items() if k not in ("tokens", "windows")}
        return [Part(self.kind, self.name, protocol, values, seconds=time.perf_counter() - start)]

    @cached_property
    def _tokenizer(self) -> Any:
        """The model's own, or the dense model's."""
        own, against = self.opened.tokenizer, self.wanted.against
        if own is None and against:
            own = load_tokenizer(against, self.wanted.trust_remote_code)
        return own or self.opened.required_tokenizer()

    def _windows(self, length: int) -> Tensor:
        """The first windows of the text by its protocol [n, seqlen], or the ready ones."""
        source, limit = self._source, self.wanted.num_samples
        if source is None:
            return read_npy(Path(self.name))[:limit]
        tokenizer = self._tokenizer
        texts = source.read(length * limit) if limit else list(source.texts)
        windows = joined_windows(texts, source.protocol.joiner, tokenizer, length)[:limit]
        if not len(windows):
            raise InputError(f"{self.name} is shorter than one window of {length} tokens: use a smaller "
                             "--max-seq-length")  # fmt: skip
        return windows

    def _scores(self, windows: Tensor, dense: PreTrainedModel | None) -> Evaluation:
        def scores(batch_size: int) -> Evaluation:
            return evaluate(self.opened.model, windows, against=dense, batch_size=batch_size, shared=True)

        if isinstance(self.wanted.batch_size, int):
            return scores(self.wanted.batch_size)
        largest: Evaluation = find_executable_batch_size(scores, starting_batch_size=LARGEST_BATCH)()
        return largest

    def _bos(self, windows: Tensor) -> str:
        """Which windows begin with the start token."""
        holders = (self.opened.tokenizer, self.opened.model.config.get_text_config(decoder=True))
        tokens = [getattr(holder, "bos_token_id", None) for holder in holders]
        starts = (windows[:, 0] == next((t for t in tokens if isinstance(t, int)), -1)).tolist()
        return "every window" if all(starts) else "first window" if starts[0] else "none"
