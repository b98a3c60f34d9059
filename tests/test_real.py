"""Real trained models and real text: perplexities agree with an independent float64 walk within 1 %."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmprune_eval import evaluate
from llmprune_eval.loading import load_model, load_tokenizer
from llmprune_eval.text import joined_windows, open_text

from llmprune import PruneConfig, prune

pytestmark = pytest.mark.shared

EXPECTED = [
    ("tinystories-llama-1m", "dense", "0.5", 10.96),
    ("tinystories-llama-1m", "magnitude", "0.5", 12.96),
    ("tinystories-llama-1m", "wanda", "0.5", 12.74),
    ("tinystories-llama-1m", "stade", "0.5", 12.70),
    ("tinystories-llama-1m", "sparsegpt", "0.5", 12.21),
    ("tinystories-opt-1m", "magnitude", "2:4", 17.53),
    ("tinystories-opt-1m", "wanda", "2:4", 17.40),
    ("tinystories-opt-1m", "stade", "2:4", 17.05),
    ("tinystories-opt-1m", "sparsegpt", "2:4", 14.45),
]


@pytest.mark.parametrize(("model", "method", "pattern", "perplexity"), EXPECTED)
def test_perplexity_agrees_with_an_independent_walk(
    shared: Path, model: str, method: str, pattern: str, perplexity: float
) -> None:
    folder = str(shared / "models" / model)
    tokenizer, pruned = load_tokenizer(folder), load_model(folder)
    if method != "dense":
        config = PruneConfig(
            method=method,
            dataset=str(shared / "text" / "tinystories-train.jsonl"),
            num_calibration_samples=64,
            max_seq_length=256,
            num_holdout_samples=0,
            **({"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}),
        )
        prune(pruned, config, tokenizer=tokenizer)
    source = open_text(str(shared / "text" / "tinystories-val.jsonl"), "test")
    windows = joined_windows(source.texts, "\n", tokenizer, 256)[:150]
    assert evaluate(pruned, windows).perplexity == pytest.approx(perplexity, rel=0.01)
