"""Zeros for packed checkpoints, made by hand, and folders that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"


def pair_up_(weight: Tensor, seed: int = 0) -> None:
    """Zero two of every four consecutive inputs of [out, in] at random, of a short last group one or two."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, weight.shape[1], 4):
        group = weight[:, start : start + 4]
        gone = torch.rand(group.shape, generator=generator).argsort(1)[:, : max(group.shape[1] - 2, 1)]
        group.scatter_(1, gone, 0.0)


@torch.no_grad()
def make_24_(model: PreTrainedModel, roles: frozenset[str], transposed: bool = False) -> None:
    """Make every matrix whose layer's name ends in one of `roles` 2:4; True if they are stored as [in, out]."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in roles and parameter.ndim == 2:
            pair_up_(parameter.data.T if transposed else parameter.data)


def state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever its files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of the quantization_config."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change of the weights of a folder with one file."""

    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return apply
