"""Cutting whole units out of a model, and looking at what is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune import PruneConfig, PruneResult, prune


def cut(model: PreTrainedModel, sparsity: float, **options: Any) -> PruneResult:
    """Prune by magnitude, which needs no data."""
    config = PruneConfig(**{"method": "magnitude", "pattern": "uniform", "device": "cpu", **options}, sparsity=sparsity)
    return prune(model, config)


def block_sizes(model: PreTrainedModel, path: str = "model.layers") -> list[int]:
    """Parameters of every block."""
    blocks: Any = model.get_submodule(path)
    return [sum(p.numel() for p in block.parameters()) for block in blocks]


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: PreTrainedModel, before: Mapping[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())
