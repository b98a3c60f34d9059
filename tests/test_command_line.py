"""What repeats a run: read back by the command line, or by Python, it gives the same settings."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmprune import PruneConfig, commands, prune
from llmprune.command_line import python_call, shell_command
from llmprune.structured.task import LearningOptions

CONFIGS = [
    PruneConfig(),
    PruneConfig(method="regress", pattern="2:4", dataset="a file's.jsonl", seed=3, max_seq_length=64, mix=0.5,
                residual=0.25, ignore=("down_proj", "re:.*q.*"), targets=("Linear",), device="cpu", dtype="bfloat16"),
    PruneConfig(sparsity=0.6, refine="swap", compensation="least-squares", sequential="site", target="dense",
                num_calibration_samples=5, num_holdout_samples=0, batch_size=2, trust_remote_code=True),
    PruneConfig(method="maskprune", sparsity=0.3, keep_heads=True, round_channels=4, learning=LearningOptions(
        steps=20, passes=2, schedule="paper", kl=0.5, ce=0.25, hidden=2.0, lora_rank=2, checkpointing=True)),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_the_command_gives_the_same_run(
    config: PruneConfig, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(commands, "run_prune", lambda *given: seen.extend(given) or "")
    command = shlex.split(shell_command(config, "a folder"))
    assert command[0] == "llmprune"
    code, _, err = cli(*command[1:])
    assert code == 0, err
    assert (seen[0], str(seen[1]), seen[2]) == ("a folder", "OUT", config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_the_call_gives_the_same_run(config: PruneConfig) -> None:
    text = python_call(config, None, tokens=True, holdout=False)
    told: list[Any] = []
    names = {"prune": lambda *given, **named: told.extend([*given, named]), "PruneConfig": PruneConfig,
             "LearningOptions": LearningOptions, "model": "m", "tokens": "t"}  # fmt: skip
    eval(text, names)
    assert told == ["m", config, {"tokens": "t"}]


def test_a_report_says_what_was_called(llama: PreTrainedModel, saved_llama: Any, windows: torch.Tensor) -> None:
    config = PruneConfig(method="magnitude", device="cpu")
    assert prune(saved_llama, config).report.command == (
        f"llmprune prune {saved_llama} -o OUT --method magnitude --device cpu"
    )
    assert prune(llama, config, tokens=windows, holdout=windows[:2].numpy()).report.command == (
        "prune(model, PruneConfig(method='magnitude', device='cpu'), tokens=tokens, holdout=holdout)"
    )
