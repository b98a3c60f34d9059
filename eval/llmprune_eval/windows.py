"""Which windows of tokens a model can take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from llmprune_eval.errors import InputError
from llmprune_eval.ready_windows import check_npy
from llmprune_eval.text import open_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEFAULT_LENGTH = 2048


def model_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the config announces, or None if it announces none."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def window_length(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens per window: as asked, or min(2048, positions).

    Raises:
        InputError: less than two, or more than the model has positions for.
    """
    positions = model_positions(model)
    if asked is None:
        return min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    if asked < 2:
        raise InputError(f"windows of {asked} tokens are too short: pass a --max-seq-length of at least 2")
    if positions is not None and asked > positions:
        raise InputError(
            f"windows of {asked} tokens exceed the model's {positions} positions: pass --max-seq-length {positions} "
            "or less"
        )
    return asked


def check_dataset(spec: str | None, split: str = "train") -> None:
    """Raise InputError for a dataset that is not there, without reading any; None and Hub names pass."""
    if spec is not None and spec.endswith(".npy"):
        check_npy(Path(spec))
    elif spec not in (None, "self"):
        open_text(spec, split)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return len(weight)


def check_vocabulary(model: PreTrainedModel, windows: Tensor, name: str) -> None:
    """Raise InputError for token ids that the model has no embedding for."""
    size = vocabulary_size(model)
    if windows.numel() and (int(windows.max()) >= size or int(windows.min()) < 0):
        raise InputError(
            f"{name} holds token ids from {int(windows.min())} to {int(windows.max())}, but the model's vocabulary "
            f"ends at {size - 1}: use the tokenizer that belongs to the model"
        )
