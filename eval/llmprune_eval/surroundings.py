"""What a figure depends on besides the model: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

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
