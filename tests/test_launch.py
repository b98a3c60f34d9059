"""Several processes: the same masks as one, and nothing left behind by a failure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT

from llmprune import PruneConfig, prune
from llmprune.launch import launcher_arguments


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (["/env/bin/python", "/env/bin/accelerate", "launch", "--cpu", "-m", "llmprune"], ["--cpu", "-m", "llmprune"]),
        (["python", "/env/bin/accelerate-launch", "--num_processes", "2"], ["--num_processes", "2"]),
        (["python", "-m", "accelerate.commands.launch", "--cpu"], ["--cpu"]),
        (["bash", "-c", "llmprune prune"], None),
        (["python", "/env/bin/accelerate", "config"], None),
    ],
)
def test_launcher_arguments(command: list[str], wanted: list[str] | None) -> None:
    assert launcher_arguments(command) == wanted


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --num_processes 2 --cpu -m llmprune ...` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    accelerate = Path(sys.executable).with_name("accelerate")
    start = [accelerate, "launch", "--num_processes", "2", "--cpu", "--main_process_port", port, "-m", "llmprune"]
    command = [str(word) for word in (*start, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)


@pytest.mark.parametrize(
    ("method", "compensation", "tolerance", "flips"),
    # Least squares is solved to a residual, in sums that two processes take in another order; where each site is
    # solved behind those before it, what is left at one decides between near ties at the next.
    [
        ("stade", "bias", 1e-5, 0.0),
        ("sparsegpt", "none", 1e-5, 0.0),
        ("wanda", "least-squares", 3e-3, 0.0),
        ("regress", "least-squares", 1e-2, 2e-2),
    ],
)
def test_two_processes_give_the_weights_of_one(
    method: str,
    compensation: str,
    tolerance: float,
    flips: float,
    saved_llama: Path,
    windows: torch.Tensor,
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "windows.npy", windows.numpy())
    done = launch(
        "prune", saved_llama, "-o", tmp_path / "two", "--method", method, "--pattern", "2:4", "--batch-size", 2,
        "--dataset", tmp_path / "windows.npy", "--device", "cpu", "--compensation", compensation,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "two" / "llmprune.json").read_text())
    assert manifest["processes"] == 2
    assert {site["tokens"] for block in manifest["blocks"] for site in block["sites"]} == {windows.numel()}

    config = PruneConfig(method=method, pattern="2:4", batch_size=3, compensation=compensation)
    alone = prune(str(saved_llama), config, tokens=windows)
    together = load_file(tmp_path / "two" / "model.safetensors")
    for name, weight in alone.model.state_dict().items():
        if name in together:
            other = together[name]
            assert ((weight == 0) != (other == 0)).double().mean() <= flips, name
            assert (~torch.isclose(weight, other, rtol=1e-4, atol=tolerance)).double().mean() <= flips, name


def test_an_error_on_two_processes_is_said_once_and_leaves_nothing(saved_llama: Path, tmp_path: Path) -> None:
    done = launch("prune", saved_llama, "-o", tmp_path / "two", "--dataset", tmp_path / "absent.npy")
    assert done.returncode != 0
    assert done.stderr.count("llmprune: ") == 1
    assert not (tmp_path / "two").exists()
