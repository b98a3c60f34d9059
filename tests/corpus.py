"""One text of known tokens in every format, and what is asked of an answer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from broken import words
from torch import Tensor
from transformers import AutoModelForCausalLM

LENGTH = 16
TEXT = words(400)
IDS = torch.tensor([int(word[1:]) for word in TEXT.split()])
WINDOWS = IDS.view(-1, LENGTH)
ROLES = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
SITES = [f"model.layers.{i}.{role}" for i in range(3) for role in ROLES.split()]


def write_every_format(folder: Path) -> Path:
    """The same text as a.txt, a.jsonl, a.parquet and, in windows, a.npy."""
    third = len(TEXT) // 3
    cuts = [0, TEXT.index(" ", third), TEXT.index(" ", 2 * third), len(TEXT)]
    texts = [TEXT[start:end].strip() for start, end in pairwise(cuts)]
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": texts}), folder / "a.parquet")
    np.save(folder / "a.npy", WINDOWS.numpy().astype(np.uint16))
    return folder


def strict_json(text: str) -> Any:
    """Without Python's own NaN and Infinity, which are no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def log_probabilities(folder: Path, windows: Tensor) -> Tensor:
    """Of the next token, in float64, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([model(window[None]).logits[0, :-1].log_softmax(-1) for window in windows])
