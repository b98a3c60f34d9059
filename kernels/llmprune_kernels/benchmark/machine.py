"""What a figure depends on besides the kernel: the GPU, its clocks, versions, the commit."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import torch

from llmprune_kernels.measured import cusparselt_version, triton_version

UNKNOWN = "unknown"


def facts(device: torch.device, commit: str, command: str) -> dict[str, str]:
    """Columns that all rows of a run share. Clocks are those of the moment: ask while the GPU is busy.

    Args:
        device: a CUDA device.
        commit: of the code that runs.
    """
    driver, sm, memory = _clocks(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver,
        "sm_clock_mhz": sm,
        "memory_clock_mhz": memory,
        "torch": torch.__version__,
        "triton": triton_version(),
        "cusparselt": cusparselt_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def commit(root: Path) -> str:
    """The commit checked out, with "+changes" if files differ from it; "unknown" without a repository."""
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return UNKNOWN
    return head + ("+changes" if _output("git", "-C", str(root), "status", "--porcelain") else "")


def _clocks(device: torch.device) -> tuple[str, str, str]:
    """Driver, and clocks of multiprocessors and memory in MHz."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
    line = _output("nvidia-smi", "-i", uuid, query, "--format=csv,noheader,nounits")
    parts = [part.strip() for part in (line or "").split(",")]
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else (UNKNOWN, UNKNOWN, UNKNOWN)


def _output(*command: str) -> str | None:
    """What a program prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
