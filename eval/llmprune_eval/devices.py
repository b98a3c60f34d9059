"""Where a model computes, alone or as one of several processes."""

from __future__ import annotations

import os
import re
from datetime import timedelta

import torch
from accelerate import PartialState

from llmprune_eval.errors import InputError

PATIENCE = timedelta(weeks=52)
"""How long a process waits for the others, some of whose work may be longer."""


def resolve_device(name: str) -> torch.device:
    """The device of this rank; joins the process group when started by `accelerate launch` or torchrun.

    Raises:
        InputError: there is no such device.
    """
    check_device(name)
    kind = name.split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif kind != "cpu" and not getattr(torch, kind).is_available():
        raise InputError(f"--device {name}: this machine or this torch has no {kind}; use --device cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return torch.device(PartialState(cpu=kind == "cpu" or None, timeout=PATIENCE).device)
    device = torch.device(name if ":" in name else kind)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def check_device(name: str) -> None:
    """Raise InputError for what cannot be the name of a device."""
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", name):
        raise InputError(f"device '{name}' is unknown: use auto, cpu, cuda or cuda:N")
