"""What all tests share: tiny random models, and the real ones where they are at hand."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network; read when transformers is imported

import warm
from broken import tree, word_tokenizer
from brute_force import Statistics
from corpus import write_every_format
from tiny import SHARED, make_llama, make_windows
from transformers import PreTrainedModel

from llmprune import checkpoint
from llmprune.criteria.wanda import Wanda
from llmprune.sites import Site

torch.set_num_threads(1)  # the suite runs on every core already
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1  # a fork ends with its parent: while one lives, pytest-xdist waits for a worker that is gone
    libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quick_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reloads are proved in a process that had imported transformers before: seconds less for each."""
    monkeypatch.setattr(checkpoint, "subprocess", warm)


@pytest.fixture
def fresh_process(_quick_proof: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reloads are proved as they are for users."""
    monkeypatch.setattr(checkpoint, "subprocess", subprocess)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost such small models more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    return make_windows()


@pytest.fixture
def statistics(monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """What Wanda is given, by site: count, mean, variance, energy."""
    seen: Statistics = {}
    score = Wanda.score

    def spy(self: Wanda, site: Site) -> torch.Tensor:
        assert site.statistics is not None and site.statistics.moments is not None
        moments = site.statistics.moments
        seen[site.name] = (moments.count, moments.mean, moments.variance, moments.energy)
        return score(self, site)

    monkeypatch.setattr(Wanda, "score", spy)
    return seen


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
        capsys.readouterr()  # what the test itself has printed on its way here
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def ok(cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must succeed; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        code, out, err = cli(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The same text in every format."""
    return write_every_format(tmp_path / "data")


@pytest.fixture(scope="session")
def _complete_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def dense(_complete_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama as a folder with a tokenizer of 97 words."""
    return Path(shutil.copytree(_complete_llama, tmp_path / "dense"))


@pytest.fixture
def refused(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that must fail with exit code 2 and one line, writing nothing; returns the line.

    Logs and warnings go to stderr as they do outside of the tests. `progress` allows the lines about blocks
    that were pruned before the trouble was found.
    """

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, progress: bool = False) -> str:
        before = tree(tmp_path)
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            patch.setattr(logging.root, "handlers", [])
            for handler in logging.getLogger("transformers").handlers:
                if type(handler) is logging.StreamHandler:  # its own, which holds on to an earlier stderr
                    patch.setattr(handler, "stream", sys.stderr)
            code, out, err = cli(*arguments)
        lines = [line for line in err.splitlines() if not (progress and line.startswith("model.layers."))]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert lines[0].startswith("llmprune: ")
        assert not warned, [str(w.message) for w in warned]
        assert tree(tmp_path) == before
        return lines[0]

    return run


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save without the proof that it reloads."""
    monkeypatch.setattr(checkpoint, "prove_reload", lambda model, folder: {"weights": "identical"})
