"""Several processes: the same masks as one, and nothing left behind by a failure."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmprune_eval.launch import launcher_arguments
from safetensors.torch import load_file
from tiny import ROOT, make_llama, make_windows
from torch import nn

from llmprune import PruneConfig, prune
from llmprune.structured.task import LearningOptions

Written = tuple[dict[str, Any], dict[str, torch.Tensor]]


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


def free_port() -> int:
    """Below those that the system gives out by itself, to the other tests too."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def one_thread_each() -> dict[str, str]:
    """For two processes on two cores, however many torch sees."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(*arguments: object, module: str = "llmprune") -> subprocess.CompletedProcess[str]:
    """`accelerate launch --num_processes 2 --cpu -m MODULE ...` on a free port."""
    accelerate = Path(sys.executable).with_name("accelerate")
    start = [accelerate, "launch", "--num_processes", "2", "--cpu", "--main_process_port", free_port(), "-m", module]
    command = [str(word) for word in (*start, *arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, env=one_thread_each()
    )


def run_ranks(commands: list[list[str]]) -> None:
    """Several command lines in one pair of processes, started as torchrun starts them."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "many_commands.py"), json.dumps(commands)],
            env={**one_thread_each(), **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors


def command_for(saved: Path, windows: Path, output: Path, options: tuple[str, ...]) -> list[str]:
    """`prune` on two processes."""
    pattern = () if "--pattern" in options else ("--pattern", "2:4")
    words = ("prune", saved, "-o", output, *pattern, "--batch-size", 2, "--dataset", windows, "--device", "cpu")
    return [str(word) for word in (*words, *options)]


def written(output: Path, windows: torch.Tensor) -> Written:
    """The manifest and the weights that two processes wrote."""
    manifest = json.loads((output / "llmprune.json").read_text())
    assert manifest["processes"] == 2
    assert {site["tokens"] for block in manifest["blocks"] for site in block["sites"]} == {windows.numel()}
    return manifest, load_file(output / "model.safetensors")


TOGETHER = {
    "sparsegpt": ("--method", "sparsegpt"),
    "least squares": ("--method", "wanda", "--compensation", "least-squares"),
    "regress": ("--method", "regress", "--refine", "none"),
    "swap": ("--method", "regress", "--refine", "swap"),
    "maskprune": ("--method", "maskprune", "--pattern", "uniform", "--sparsity", "0.25", "--steps", "40"),
}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What two processes write, by the names in TOGETHER; "dense" is the model, "windows" the text."""
    folder = tmp_path_factory.mktemp("two")
    found = {name: folder / name for name in (*TOGETHER, "dense")} | {"windows": folder / "windows.npy"}
    torch.manual_seed(0)
    make_llama().save_pretrained(found["dense"])
    np.save(found["windows"], make_windows().numpy())
    run_ranks([command_for(found["dense"], found["windows"], found[name], how) for name, how in TOGETHER.items()])
    return found


def assert_same_masks(model: nn.Module, together: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, weight in model.state_dict().items():
        if name in together:
            assert torch.equal(weight == 0, together[name] == 0), name
            torch.testing.assert_close(weight, together[name], rtol=1e-4, atol=tolerance)


def test_two_processes_of_accelerate_launch(saved_llama: Path, windows: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "windows.npy", windows.numpy())
    options = ("--method", "stade", "--compensation", "bias")
    done = launch(*command_for(saved_llama, tmp_path / "windows.npy", tmp_path / "two", options))
    assert done.returncode == 0, done.stderr
    manifest, together = written(tmp_path / "two", windows)
    assert manifest["reload"]["weights"] == "identical"
    config = PruneConfig(method="stade", pattern="2:4", batch_size=3, compensation="bias")
    assert_same_masks(prune(str(saved_llama), config, tokens=windows).model, together, 1e-5)


@pytest.mark.parametrize(
    ("name", "method", "compensation", "tolerance"),
    # Least squares is solved to a residual, in sums that two processes take in another order.
    [("sparsegpt", "sparsegpt", "none", 1e-5), ("least squares", "wanda", "least-squares", 3e-3)],
)
def test_two_processes_give_the_weights_of_one(
    name: str, method: str, compensation: str, tolerance: float, by_two: dict[str, Path], windows: torch.Tensor
) -> None:
    _, together = written(by_two[name], windows)
    config = PruneConfig(method=method, pattern="2:4", batch_size=3, compensation=compensation)
    assert_same_masks(prune(str(by_two["dense"]), config, tokens=windows).model, together, tolerance)


@pytest.mark.parametrize("refine", ["none", "swap"])
def test_two_processes_regress_as_well_as_one(refine: str, by_two: dict[str, Path], windows: torch.Tensor) -> None:
    """Where exchanges tie, rounding may choose another, and every site behind it differs: there errors are compared."""
    manifest, together = written(by_two["swap" if refine == "swap" else "regress"], windows)
    config = PruneConfig(method="regress", pattern="2:4", batch_size=3, refine=refine)
    near = 0.05 if refine == "none" else 0.1
    alone = prune(str(by_two["dense"]), config, tokens=windows)
    theirs = {site["name"]: site["relative_error"] for block in manifest["blocks"] for site in block["sites"]}
    for block in alone.report.blocks:
        for site in block.sites:
            assert theirs[site.name] == pytest.approx(site.relative_error, rel=near), site.name
            if refine == "none":
                weight, other = (state[f"{site.name}.weight"] for state in (alone.model.state_dict(), together))
                assert ((weight == 0) != (other == 0)).double().mean() < 0.005, site.name


def test_two_processes_learn_the_masks_of_one(by_two: dict[str, Path], windows: torch.Tensor) -> None:
    manifest, together = written(by_two["maskprune"], windows)
    config = PruneConfig(method="maskprune", sparsity=0.25, learning=LearningOptions(steps=40))
    alone = prune(str(by_two["dense"]), config, tokens=windows)
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
