"""Perplexity, and with a dense reference the divergence from it, on the same tokens.

Protocol of the pruning papers: texts joined, tokenised once, cut into non-overlapping windows; every
window is scored from its second token on, with nothing before it; perplexity is exp of the mean over all
scored tokens. It is not lm-eval's `wikitext` task, which scores words of detokenised documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from llmprune_eval.errors import InputError
from llmprune_eval.windows import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROWS = 2048
"""Tokens whose distributions are compared at a time: bounds the float32 copies of the logits."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in full precision.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per scored token.
        tokens: number of scored tokens.
        windows: number of windows.
        dense_perplexity: the reference's own, or None.
        kl: mean over tokens of KL(dense || model) in nats, or None.
        top1_agreement: share of tokens at which both models rank the same token first, or None.
    """

    perplexity: float
    tokens: int
    windows: int
    dense_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Only what was measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    against: PreTrainedModel | None = None,
    batch_size: int = 8,
    shared: bool = False,
) -> Evaluation:
    """Score token windows [n, seqlen] with `model` and compare with `against`.

    Args:
        shared: True if all processes call this with the same windows and each is to score its share of them.

    Raises:
        InputError: no window, or the logits are not finite.
    """
    if not len(windows):
        raise InputError("there is no window to evaluate: give more text or a smaller --max-seq-length")
    sizes = [vocabulary_size(one) for one in (model, against) if one is not None]
    if len(set(sizes)) > 1:
        raise InputError(
            f"the two models have vocabularies of {sizes[0]} and {sizes[1]}: --against must be the model that the "
            "other was pruned from"
        )
    totals = [0.0] * 4  # the model's loss, the dense model's, KL, tokens that both rank first
    with evaluating(model), evaluating(against) if against is not None else nullcontext():
        for batch in tqdm(_own(windows, shared).split(batch_size), desc="evaluating", disable=None, leave=False):
            labels = batch[:, 1:].flatten()
            logits = _logits(model, batch)
            dense = _logits(against, batch) if against is not None else None
            for first in range(0, len(labels), ROWS):
                rows = slice(first, first + ROWS)
                own = F.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
                wanted = labels[rows].to(own.device)
                totals[0] += F.nll_loss(own, wanted, reduction="sum").item()
                if dense is not None:
                    reference = F.log_softmax(dense[rows], dim=-1, dtype=torch.float32).to(own.device)
                    totals[1] += F.nll_loss(reference, wanted, reduction="sum").item()
                    totals[2] += (reference.exp() * (reference - own)).sum().item()
                    totals[3] += (reference.argmax(-1) == own.argmax(-1)).sum().item()
    nll, dense_nll, kl, same = _summed(totals) if shared else totals
    tokens = windows[:, 1:].numel()
    for total, whose in ((nll, "the model's"), (dense_nll, "the dense model's")):
        if not math.isfinite(total):
            raise InputError(f"{whose} logits are not finite (NaN or infinity): try --dtype float32")
    if against is None:
        return Evaluation(_exp(nll / tokens), tokens, len(windows))
    return Evaluation(_exp(nll / tokens), tokens, len(windows), _exp(dense_nll / tokens), kl / tokens, same / tokens)


def _own(windows: Tensor, shared: bool) -> Tensor:
    """This process's share."""
    if not shared:
        return windows
    state = PartialState()
    return windows[state.process_index :: state.num_processes]


def _summed(totals: list[float]) -> list[float]:
    """Over all processes, in their order."""
    return [sum(parts) for parts in zip(*gather_object([totals]), strict=True)]


def _exp(mean: float) -> float:
    """exp without OverflowError: a ruined model has a perplexity, if a useless one."""
    return math.exp(mean) if mean < 700 else math.inf


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """[batch * (seqlen - 1), vocabulary]."""
    device = next(model.get_input_embeddings().parameters()).device
    output: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
    return output[:, :-1].flatten(0, 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout), with every module's own mode restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
