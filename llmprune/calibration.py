"""Token windows for calibration, [n, seqlen], all full: from a file, a dataset, or the model itself.

Also draws the windows on which the loss before and after pruning is measured; no window is in both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llmprune_eval.ready_windows import digest, read_npy
from llmprune_eval.text import TextSource, joined_windows, open_text, token_ids
from llmprune_eval.windows import check_vocabulary, vocabulary_size, window_length
from torch import Tensor
from tqdm import tqdm

from llmprune.config import PruneConfig
from llmprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Windows of tokens and where they came from.

    Attributes:
        windows: [n, seqlen] int64 to calibrate on.
        holdout: [k, seqlen] int64, disjoint from `windows`; k may be 0.
        origin: dataset, protocol and counts, for the manifest.
    """

    windows: Tensor
    holdout: Tensor
    origin: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Origin, sizes and the SHA-256 of the tokens (int64, little endian, in order)."""
        count, length = self.windows.shape
        return {
            **self.origin,
            "windows_used": count,
            "seqlen": length,
            "sha256": digest(self.windows),
            "holdout": len(self.holdout),
            "holdout_sha256": digest(self.holdout) if len(self.holdout) else None,
        }


def load_windows(config: PruneConfig, model: PreTrainedModel, tokenizer: Any | None) -> Calibration:
    """The calibration and holdout windows that a config asks for.

    Raises:
        InputError: no dataset, no tokenizer for text, too little text, token ids outside the vocabulary.
    """
    spec = config.dataset
    if spec is None:
        raise InputError("no calibration data: pass --dataset FILE, a Hub name, or 'self'")
    origin: dict[str, Any]
    if spec.endswith(".npy"):
        windows = read_npy(Path(spec), config.max_seq_length)
        window_length(model, windows.shape[1])
        origin = {"dataset": spec, "windows": "ready, in order"}
    else:
        length = window_length(model, config.max_seq_length)
        wanted = config.num_calibration_samples + config.num_holdout_samples
        if spec == "self":
            windows = _written_by_model(model, tokenizer, wanted, length, config)
            origin = {"dataset": "self", "windows": "sampled from the model"}
        else:
            if tokenizer is None:
                raise InputError(f"the model has no tokenizer to read {spec} with: pass ready token windows as .npy")
            source = open_text(spec, "train")
            windows, origin = _text_windows(source, tokenizer, wanted, length, config.seed), source.describe()
    check_vocabulary(model, windows, spec)
    return _split(windows, config, origin, ready=spec.endswith(".npy"))


def _split(windows: Tensor, config: PruneConfig, origin: dict[str, Any], ready: bool) -> Calibration:
    """The first windows calibrate, the next are held out.

    Of a text too short for both an eighth at most is held out; of `ready` windows only what is left over.
    """
    wanted = config.num_calibration_samples
    spare = max(len(windows) - wanted, 0 if ready else len(windows) // 8)
    held_out = min(config.num_holdout_samples, spare)
    used = min(wanted, len(windows) - held_out)
    if used < wanted:
        log.warning(
            "%s gives %d windows: %d calibrate (%d were asked for), %d are held out",
            origin["dataset"], len(windows), used, wanted, held_out,
        )  # fmt: skip
    return Calibration(windows[:used].clone(), windows[used : used + held_out].clone(), origin)


def _text_windows(source: TextSource, tokenizer: Any, wanted: int, length: int, seed: int) -> Tensor:
    """`wanted` windows in seeded random order, or as many as the text gives."""
    texts = source.read(wanted * length)
    order = np.random.default_rng(seed)
    if source.protocol.cuts:
        windows = _random_cuts(texts, tokenizer, wanted, length, order)
        what = f"{len(texts)} texts, none longer than {length} tokens"
    else:
        windows = joined_windows(texts, source.protocol.joiner, tokenizer, length)
        windows = windows[torch.from_numpy(order.permutation(len(windows)))]
        what = f"less than one window of {length} tokens"
    if not len(windows):
        raise InputError(f"{source.name} gives {what}: give more text, or a smaller --max-seq-length")
    return windows[:wanted]


def _random_cuts(texts: list[str], tokenizer: Any, wanted: int, length: int, order: np.random.Generator) -> Tensor:
    """One cut at a random place of each of `wanted` random texts that are longer than a window."""
    windows: list[Tensor] = []
    for index in order.permutation(len(texts)):
        ids = token_ids(tokenizer, texts[index])
        if len(ids) > length:
            start = int(order.integers(0, len(ids) - length))
            windows.append(ids[start : start + length])
        if len(windows) == wanted:
            break
    return torch.stack(windows) if windows else torch.empty(0, length, dtype=torch.long)


@torch.no_grad()
def _written_by_model(
    model: PreTrainedModel, tokenizer: Any | None, wanted: int, length: int, config: PruneConfig
) -> Tensor:
    """Text that the model samples at temperature 1 from its own start token (or from random ones)."""
    vocabulary = vocabulary_size(model)
    # Not every config names a start token, and some name one that the embedding does not have.
    named = [getattr(o, "bos_token_id", None) for o in (tokenizer, model.config.get_text_config(decoder=True))]
    start = next((token for token in named if isinstance(token, int) and token < vocabulary), None)
    written: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for done in tqdm(range(0, wanted, config.batch_size), desc="the model writes", disable=None, leave=False):
            count = min(config.batch_size, wanted - done)
            first = torch.randint(vocabulary, (count, 1)) if start is None else torch.full((count, 1), start)
            first = first.to(next(model.get_input_embeddings().parameters()).device)
            if not written and not torch.isfinite(model(input_ids=first).logits).all():
                raise InputError("the model's logits are not finite (NaN or infinity): try --dtype float32")
            generate: Any = model.generate
            text = generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=0,
            )
            written.append(text.cpu())
    return torch.cat(written)
