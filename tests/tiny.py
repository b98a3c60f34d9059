"""Tiny random models and where the project lies."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmprune.criteria import methods

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
WEIGHT_METHODS = [name for name, method in methods().items() if method.pattern != "uniform"]
"""Those that score single weights; the others score whole units alone."""


def make_llama(**changes: object) -> PreTrainedModel:
    """A tiny random Llama with grouped queries and odd widths where they are allowed."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 68,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def make_windows() -> torch.Tensor:
    """Token windows [11, 24] for the tiny models: an odd count, so that the last micro-batch is ragged."""
    return torch.randint(0, 97, (11, 24), generator=torch.Generator().manual_seed(1))
