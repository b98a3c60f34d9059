"""Ready token windows [n, seqlen]: from an .npy file, or handed over in Python."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune_eval.errors import InputError

Windows = Tensor | np.ndarray[Any, Any] | Sequence[Sequence[int]]
"""What a user may hand over as token windows [n, seqlen]."""


def digest(windows: Tensor) -> str:
    """SHA-256 of token windows (int64, little endian, in order)."""
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()


def check_npy(path: Path) -> None:
    """Raise InputError unless the file is there."""
    if not os.path.isfile(path):
        raise InputError(f"dataset '{path}' does not exist: give a .npy file of token ids [n, seqlen]")


def read_npy(path: Path, length: int | None = None) -> Tensor:
    """All windows of a file, int64 [n, seqlen], in order and as they are.

    Raises:
        InputError: no such array, or its windows are not `length` tokens long.
    """
    check_npy(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # never unpickles, never unzips
    except (ValueError, EOFError, OSError, SyntaxError, TokenError) as error:
        raise InputError(
            f"{path} cannot be read as .npy ({error}): write integer token ids [n, seqlen] with numpy.save"
        ) from error
    windows = as_windows(array, str(path))
    if length not in (None, windows.shape[1]):
        raise InputError(
            f"{path} holds windows of {windows.shape[1]} tokens, which are used as they are: leave out "
            f"--max-seq-length {length}"
        )
    return windows


def as_windows(given: Windows, name: str, least: int = 1) -> Tensor:
    """A tensor, an array or nested lists of integer token ids [n, seqlen] as int64 on the CPU.

    Raises:
        InputError: it is something else, or holds less than `least` windows, or windows of less than two tokens.
    """
    wanted = "integer token ids [n, seqlen] are wanted"
    try:
        windows = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))  # a copy: may be read-only
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be made one array ({error}): {wanted}") from error
    shape, dtype = tuple(windows.shape), windows.dtype
    if len(shape) != 2 or dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise InputError(f"{name}: {str(dtype).removeprefix('torch.')} {shape} was given, {wanted}")
    if shape[0] < least or shape[1] < 2:
        raise InputError(f"{name}: windows of shape {shape} were given, at least {least} of two tokens is wanted")
    return windows.long().cpu()
