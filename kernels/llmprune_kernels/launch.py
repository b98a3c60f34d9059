"""What the host side of every kernel asks before it launches."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def interpreted(kernel: Any) -> bool:
    """True if Triton's interpreter holds the kernel: TRITON_INTERPRET was 1 when Triton was first imported."""
    import triton

    return not isinstance(kernel, triton.JITFunction)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a floating-point dtype."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def filled_up(x: Tensor, rows: int = 1, columns: int = 1) -> Tensor:
    """x [rows, in] with zeros below and beside it up to multiples; x itself where none are missing (F.pad copies)."""
    below, beside = -x.shape[0] % rows, -x.shape[1] % columns
    return F.pad(x, (0, beside, 0, below)) if below or beside else x


def check_operands(kernel: Any, layout: str, x: Tensor, values: Tensor) -> None:
    """x goes with the weight, and the kernel can run where x is.

    Raises:
        ValueError: it does not, or cannot.
    """
    if x.dtype != values.dtype or x.device != values.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, the weight {values.dtype} on {values.device}: make them equal")
    if x.device.type == "cpu" and not interpreted(kernel):
        raise ValueError(
            f"layout {layout!r} runs on a GPU, or on a CPU where TRITON_INTERPRET=1 is set: take the canonical layout"
        )


def first_line(error: Exception) -> str:
    """Of what an error says; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def trouble() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be built or run raises: CUDA's, torch's and Triton's errors, and those of tools and
    functions that are not there or take other arguments."""
    errors: tuple[type[Exception], ...] = (
        RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, subprocess.CalledProcessError,
    )  # fmt: skip
    if importlib.util.find_spec("triton") is None:
        return errors
    return (*errors, importlib.import_module("triton.errors").TritonError)
