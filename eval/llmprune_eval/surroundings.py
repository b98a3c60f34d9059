"""What a figure depends on besides the model: versions and the machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

PACKAGES = ("llmprune", "torch", "transformers", "accelerate", "safetensors", "lm_eval")


def versions() -> dict[str, str]:
    """Of what a result depends on; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str | int]:
    """The accelerator if there is one, the cores, the memory in bytes, and the threads that torch uses."""
    found: dict[str, str | int] = {
        "cores": os.cpu_count() or 0,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def peak_memory() -> int:
    """Peak resident set size of this process in bytes.

    Linux counts what a process was started from to its ru_maxrss, but not to the VmHWM of its own address space.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        windows: int = psutil.Process().memory_info().peak_wset
        return windows
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
