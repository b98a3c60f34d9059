"""What a method is given that looks at the whole model before the walk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.blocks import Block
from llmprune.errors import InputError
from llmprune.structured.minimax import SCHEDULES
from llmprune.structured.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LearningOptions:
    """How masks are learned.

    Attributes:
        steps: of the gates.
        passes: how often each calibration window is seen; with the steps it says how many a step sees.
        schedule: "from_above" (widths fixed, the set shrinks to them) or "paper" (widths learned from nothing).
        kl, ce, hidden: weights of the divergence from the dense model, of the cross-entropy, and of the mean squared
            errors of the blocks' outputs.
        lora_rank: of adapters trained beside the gates and merged; 0 leaves the weights alone.
        checkpointing: keep only what enters each block and run it again for gradients: slower, far less memory.
    """

    steps: int = 400
    passes: int = 40
    schedule: str = "from_above"
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    lora_rank: int = 0
    checkpointing: bool = False

    def given(self) -> str:
        """The settings that are not the default."""
        return ", ".join(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    def check(self) -> None:
        """Raise InputError for what makes no sense."""
        if self.steps < 10:
            raise InputError(f"steps is {self.steps}: masks are learned in phases, give at least 10")
        if self.passes < 1:
            raise InputError(f"passes is {self.passes}: every window must be seen at least once")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule '{self.schedule}' is unknown: choose from {', '.join(SCHEDULES)}")
        weights = {"kl": self.kl, "ce": self.ce, "hidden": self.hidden}
        for name, value in weights.items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}: give a weight of 0 or more")
        if not any(weights.values()):
            raise InputError("kl, ce and hidden are all 0: there is nothing to learn from")
        if self.lora_rank < 0:
            raise InputError(f"lora_rank is {self.lora_rank}: give 0 for no adapters, or a rank such as 8")


@dataclass
class Task:
    """A model to look at as a whole.

    Attributes:
        windows: token ids [n, seqlen], all ranks' together.
        device: where to compute; None where the model is.
        state: file that holds what an interrupted run has learned; None keeps nothing.
        resume: go on from that file.
        curves: rows for the report, added by the method.
    """

    model: PreTrainedModel
    blocks: list[Block]
    structure: Structure
    windows: Tensor
    batch_size: int
    device: torch.device | None
    seed: int
    options: LearningOptions
    state: Path | None = None
    resume: bool = False
    curves: list[Mapping[str, Any]] = field(default_factory=list)
