"""Several processes: the same masks as one, and nothing left behind by a failure."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmprune_eval.launch import launcher_arguments
from safetensors.torch import load_file
from tiny import ROOT

from llmprune import PruneConfig, prune
from llmprune.structured.task import LearningOptions


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


def launch(*arguments: object, module: str = "llmprune") -> subprocess.CompletedProcess[str]:
    """`accelerate launch --num_processes 2 --cpu -m MODULE ...` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    accelerate = Path(sys.executable).with_name("accelerate")
    start = [accelerate, "launch", "--num_processes", "2", "--cpu", "--main_process_port", port, "-m", module]
    command = [str(word) for word in (*start, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)


def prune_by_two(
    saved: Path, windows: torch.Tensor, folder: Path, *options: str
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The manifest and the weights that two processes write."""
    np.save(folder / "windows.npy", windows.numpy())
    pattern = () if "--pattern" in options else ("--pattern", "2:4")
    done = launch("prune", saved, "-o", folder / "two", *pattern, "--batch-size", 2,
                  "--dataset", folder / "windows.npy", "--device", "cpu", *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "two" / "llmprune.json").read_text())
    assert manifest["processes"] == 2
    assert {site["tokens"] for block in manifest["blocks"] for site in block["sites"]} == {windows.numel()}
    return manifest, load_file(folder / "two" / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "compensation", "tolerance"),
    # Least squares is solved to a residual, in sums that two processes take in another order.
    [("stade", "bias", 1e-5), ("sparsegpt", "none", 1e-5), ("wanda", "least-squares", 3e-3)],
)
def test_two_processes_give_the_weights_of_one(
    method: str, compensation: str, tolerance: float, saved_llama: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    _, together = prune_by_two(saved_llama, windows, tmp_path, "--method", method, "--compensation", compensation)
    config = PruneConfig(method=method, pattern="2:4", batch_size=3, compensation=compensation)
    alone = prune(str(saved_llama), config, tokens=windows)
    for name, weight in alone.model.state_dict().items():
        if name in together:
            assert torch.equal(weight == 0, together[name] == 0), name
            torch.testing.assert_close(weight, together[name], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("refine", ["none", "swap"])
def test_two_processes_regress_as_well_as_one(
    refine: str, saved_llama: Path, windows: torch.Tensor, tmp_path: Path
) -> None:
    """Where exchanges tie, rounding may choose another, and every site behind it differs: there errors are compared."""
    manifest, together = prune_by_two(saved_llama, windows, tmp_path, "--method", "regress", "--refine", refine)
    config = PruneConfig(method="regress", pattern="2:4", batch_size=3, refine=refine)
    near = 0.05 if refine == "none" else 0.1
    alone = prune(str(saved_llama), config, tokens=windows)
    theirs = {site["name"]: site["relative_error"] for block in manifest["blocks"] for site in block["sites"]}
    for block in alone.report.blocks:
        for site in block.sites:
            assert theirs[site.name] == pytest.approx(site.relative_error, rel=near), site.name
            if refine == "none":
                weight, other = (state[f"{site.name}.weight"] for state in (alone.model.state_dict(), together))
                assert ((weight == 0) != (other == 0)).double().mean() < 0.005, site.name


def test_two_processes_learn_the_masks_of_one(saved_llama: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    options = ("--method", "maskprune", "--pattern", "uniform", "--sparsity", "0.25", "--steps", "40")
    manifest, together = prune_by_two(saved_llama, windows, tmp_path, *options)
    config = PruneConfig(method="maskprune", sparsity=0.25, learning=LearningOptions(steps=40))
    alone = prune(str(saved_llama), config, tokens=windows)
    weights = dict(alone.model.state_dict())
    assert manifest["widths"]["kept"] == (alone.report.widths or {})["kept"]
    for key, value in together.items():  # the sums of the gradients are rounded in another order, the sets are not
        assert value.shape == weights[key].shape
        assert (value - weights[key]).norm() < 1e-3 * weights[key].norm(), key


def test_an_error_on_two_processes_is_said_once_and_leaves_nothing(saved_llama: Path, tmp_path: Path) -> None:
    done = launch("prune", saved_llama, "-o", tmp_path / "two", "--dataset", tmp_path / "absent.npy")
    assert done.returncode != 0
    assert done.stderr.count("llmprune: ") == 1
    assert not (tmp_path / "two").exists()
