"""Perplexity, divergence and agreement against loops over single tokens in float64."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llmprune_eval import InputError, evaluate
from tiny import make_llama
from torch import Tensor, nn
from transformers import PreTrainedModel


def log_softmax(logits: list[float]) -> np.ndarray:
    x = np.array(logits, dtype=np.float64)
    return x - (x.max() + np.log(np.sum(np.exp(x - x.max()))))


def literal(model: PreTrainedModel, windows: Tensor, dense: PreTrainedModel) -> tuple[float, float, float]:
    """(perplexity, KL(dense || model), agreement), window by window and token by token."""
    nll, kl, same, tokens = 0.0, 0.0, 0, 0
    for window in windows:
        with torch.no_grad():
            own, other = (m(input_ids=window[None]).logits[0].tolist() for m in (model, dense))
        for t in range(len(window) - 1):
            q, p = log_softmax(own[t]), log_softmax(other[t])
            nll -= q[window[t + 1]]
            kl += float(np.sum(np.exp(p) * (p - q)))
            same += int(np.argmax(p) == np.argmax(q))
            tokens += 1
    return math.exp(nll / tokens), kl / tokens, same / tokens


class Fixed(nn.Module):
    """Says the same logits at every position, whatever is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.embedding, self.row = nn.Embedding(len(logits), 1), logits

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.row.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_figures_equal_a_loop(batch_size: int, llama: PreTrainedModel, windows: Tensor) -> None:
    torch.manual_seed(5)
    pruned = make_llama(initializer_range=0.3)
    ppl, kl, agreement = literal(pruned, windows, llama)
    got = evaluate(pruned, windows, against=llama, batch_size=batch_size)
    assert got.perplexity == pytest.approx(ppl, rel=1e-5)
    assert got.kl == pytest.approx(kl, rel=1e-4)
    assert got.top1_agreement == pytest.approx(agreement, abs=1e-9)
    assert got.dense_perplexity == pytest.approx(literal(llama, windows, llama)[0], rel=1e-5)
    assert (got.tokens, got.windows) == (11 * 23, 11)
    alone = evaluate(pruned, windows, batch_size=batch_size)
    assert alone.perplexity == got.perplexity
    assert alone.as_dict().keys() == {"perplexity", "tokens", "windows"}


def test_tokens_are_compared_in_portions_of_any_size(
    llama: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = make_llama(initializer_range=0.3)
    whole = evaluate(pruned, windows, against=llama)
    monkeypatch.setattr(import_module("llmprune_eval.evaluate"), "ROWS", 7)
    parts = evaluate(pruned, windows, against=llama)
    assert list(parts.as_dict().values()) == pytest.approx(list(whole.as_dict().values()), rel=1e-6)


def test_a_model_agrees_with_itself(llama: PreTrainedModel, windows: Tensor) -> None:
    got = evaluate(llama, windows, against=llama)
    assert got.kl == 0.0 and got.top1_agreement == 1.0 and got.perplexity == got.dense_perplexity


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(windows: Tensor) -> None:
    assert evaluate(Fixed(torch.zeros(97)), windows).perplexity == pytest.approx(97, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32(windows: Tensor) -> None:
    logits = torch.randn(97).bfloat16()
    q = log_softmax(logits.tolist())
    expected = math.exp(-np.mean([q[token] for token in windows[:, 1:].flatten().tolist()]))
    assert evaluate(Fixed(logits), windows).perplexity == pytest.approx(expected, rel=1e-5)


def test_a_ruined_model_has_an_infinite_perplexity_and_no_crash(windows: Tensor) -> None:
    logits = torch.zeros(98)
    logits[97] = 1e6  # certain of a token that never comes
    sane = Fixed(torch.zeros(98))
    got = evaluate(Fixed(logits), windows, against=sane)
    assert got.perplexity == math.inf and got.dense_perplexity == pytest.approx(98, rel=1e-6)
    assert got.kl is not None and got.kl == pytest.approx(1e6 * 97 / 98, rel=1e-5)
    assert evaluate(sane, windows, against=Fixed(logits)).dense_perplexity == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float, windows: Tensor) -> None:
    logits = torch.zeros(97)
    logits[5] = bad
    with pytest.raises(InputError, match="the model's logits are not finite"):
        evaluate(Fixed(logits), windows)
    with pytest.raises(InputError, match="the dense model's logits are not finite"):
        evaluate(Fixed(torch.zeros(97)), windows, against=Fixed(logits))


def test_models_of_different_vocabularies_and_no_windows_are_errors(llama: PreTrainedModel, windows: Tensor) -> None:
    with pytest.raises(InputError, match="vocabularies of 97 and 99"):
        evaluate(llama, windows, against=make_llama(vocab_size=99))
    with pytest.raises(InputError, match="no window"):
        evaluate(llama, windows[:0])


def test_the_mode_of_every_module_is_restored(windows: Tensor) -> None:
    torch.manual_seed(3)
    model = make_llama(attention_dropout=0.5)
    expected = evaluate(model, windows).perplexity
    model.train()
    model.lm_head.eval()
    assert evaluate(model, windows, against=model).perplexity == expected  # without dropout
    assert model.training and model.model.layers[0].training and not model.lm_head.training
