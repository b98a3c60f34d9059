"""What all tests share: tiny random models, and the real ones where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import SHARED, make_llama
from transformers import PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder with real models and texts."""
    if not (SHARED / "models").is_dir():
        pytest.skip("the real models and texts are not on this machine (../shared)")
    return SHARED


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_llama()


@pytest.fixture
def windows() -> torch.Tensor:
    """Token windows [11, 24] for the tiny models: an odd count, so that the last micro-batch is ragged."""
    return torch.randint(0, 97, (11, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved_llama(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """The tiny Llama as a folder without a tokenizer."""
    folder = tmp_path / "dense"
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `llmprune ...` in this process; returns (exit code, stdout, stderr)."""
    from llmprune.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["llmprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
