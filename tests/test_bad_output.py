"""Output that cannot be written, and runs that are cut short: the target is as it was, and nothing lies beside it."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from broken import TOKENS, tree
from llmprune_eval.run import Evaluation
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llmprune import InputError, PruneConfig, PruneResult, checkpoint, prune

Refused = Callable[..., str]
INTERRUPTED = "llmprune: interrupted; nothing half-written is left\n"
PATIENCE = 120.0


@pytest.fixture
def run(dense: Path, tmp_path: Path) -> list[str]:
    """A command that would succeed, without its output."""
    np.save(tmp_path / "windows.npy", TOKENS)
    return ["prune", str(dense), "--dataset", str(tmp_path / "windows.npy"), "--nsamples", "5"]


@pytest.fixture
def good(dense: Path, tmp_path: Path) -> Path:
    """An earlier result that must not be lost."""
    folder = tmp_path / "good"
    folder.mkdir()
    for file in dense.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "llmprune.json").write_text("{}")
    return folder


@pytest.fixture
def result(llama: PreTrainedModel) -> PruneResult:
    return prune(llama, PruneConfig(), tokens=torch.from_numpy(TOKENS))


def test_an_output_that_exists(run: list[str], good: Path, refused: Refused, result: PruneResult) -> None:
    assert "exists: choose another folder, or pass --overwrite (overwrite=True) to replace it" in refused(
        *run, "-o", good
    )
    (good / "config.json").unlink()
    assert "exists and is no model folder, so it is not replaced" in refused(*run, "-o", good, "--overwrite")
    before = tree(good)
    with pytest.raises(InputError, match="no model folder"):
        result.save(good, overwrite=True)
    assert tree(good) == before


def test_an_output_that_is_no_folder(run: list[str], tmp_path: Path, refused: Refused, result: PruneResult) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("absent")
    nowhere = r"cannot be written(: /proc is not a writable folder| \(No such file or directory\): choose another)"
    cases = {
        "file": "is a file: give a folder that does not exist yet",
        "file/out": "file is not a writable folder",
        "/proc/out": nowhere,
        "/proc/a/out": nowhere,
        "loop": "is a link that leads nowhere",
        "nowhere": "is a link that leads nowhere",
        "x" * 300: r"cannot be written \(File name too long\): choose another folder",
        "x" * 240: r"cannot be written \(File name too long\): choose another folder",
    }
    for name, message in cases.items():
        assert re.search(message, refused(*run, "-o", name)), name
        assert re.search(message, refused(*run, "-o", name, "--overwrite")), name
        with pytest.raises(InputError, match=message):
            result.save(name, overwrite=True)


def test_a_folder_without_the_right_to_write(
    run: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: False)
    assert f"{tmp_path} is not a writable folder" in refused(*run, "-o", "out")


def test_an_output_that_touches_the_input(run: list[str], dense: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to(dense)
    message = "is or contains the input model .*: choose another folder"
    for name in (dense, "link", tmp_path, "dense/../dense", "link/../dense"):
        assert re.search(message, refused(*run, "-o", name, "--overwrite")), name
    assert re.search(message, refused("prune", "link", *run[2:], "-o", dense, "--overwrite"))
    result = prune(dense, PruneConfig(), tokens=torch.from_numpy(TOKENS))
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message):
        result.save(tmp_path / "link", overwrite=True)
    assert tree(tmp_path) == before


def test_too_little_room_is_found_before_writing(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"needs [0-9.]+ kB, but .* has 1.0 kB free"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unproved")
def test_a_failing_rename_brings_the_old_model_back(
    result: PruneResult, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = tree(tmp_path), Path.rename
    for error in (OSError(5, "Input/output error"), KeyboardInterrupt()):

        def fail(path: Path, target: Path, error: BaseException = error) -> Path:
            if path.name.endswith("building"):
                raise error
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises((InputError, KeyboardInterrupt)):
                result.save(good, overwrite=True)
        assert tree(tmp_path) == before


def test_a_folder_that_comes_up_in_the_meantime_is_not_replaced(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(model: PreTrainedModel, folder: Path) -> dict[str, object]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        return {}

    monkeypatch.setattr(checkpoint, "prove_reload", slow)
    with pytest.raises(InputError, match="exists"):
        result.save(tmp_path / "out")
    assert tree(tmp_path) == {"out": "folder", "out/precious": b"x"}


@pytest.mark.usefixtures("unproved")
def test_overwriting_through_a_link_replaces_what_it_leads_to(result: PruneResult, good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    result.save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert '"weights": "identical"' in (good / "llmprune.json").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "good", "link"}


def start(*arguments: object, limit: int | None = None) -> subprocess.Popen[str]:
    """`llmprune ...` in a process group of its own; `limit` is the largest file that it can write."""

    def restrict() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in the background ignores Ctrl-C
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "llmprune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restrict,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_full_disk_leaves_the_old_model(run: list[str], good: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    process = start(*run, "-o", good, "--overwrite", limit=20_000)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, ""), err
    assert [line for line in err.splitlines() if not line.startswith("model.layers.")] == [
        f"llmprune: output {good} cannot be written, and nothing was left behind; the disk is full: make room"
    ]
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_a_full_disk_leaves_no_new_folder(
    error: Exception, result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(result.model, "save_pretrained", fail)
    with pytest.raises(InputError, match="the disk is full: make room"):
        result.save(tmp_path / "new" / "deep" / "out")
    assert not list(tmp_path.iterdir())


def interrupt(
    process: subprocess.Popen[str], ready: Callable[[], bool], number: signal.Signals = signal.SIGINT
) -> tuple[str, str]:
    """Ctrl-C, as a terminal sends it, once the process is where it is wanted; what it has said since."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number)
        return process.communicate(timeout=PATIENCE)
    finally:
        process.kill()


def test_ctrl_c_while_pruning(run: list[str], good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "windows.npy", np.tile(TOKENS, (200, 1)))
    before = tree(tmp_path)
    process = start(*run, "-o", good, "--overwrite", "--batch-size", 1, "--nsamples", 1000)
    assert process.stderr is not None
    stderr = process.stderr
    out, err = interrupt(process, lambda: stderr.readline().startswith("model.layers.0: "))
    assert process.returncode == 130
    assert (out, err) == ("", INTERRUPTED)
    assert tree(tmp_path) == before


def test_ctrl_c_while_saving(run: list[str], good: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    process = start(*run, "-o", good, "--overwrite")
    out, err = interrupt(process, lambda: any(tmp_path.glob(".good.*building/model.safetensors")))
    assert process.returncode == 130
    assert out == ""
    assert "".join(line for line in err.splitlines(True) if not line.startswith("model.layers.")) == INTERRUPTED
    assert tree(tmp_path) == before


def test_a_scheduler_that_ends_it_finds_nothing_left(run: list[str], good: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    process = start(*run, "-o", good, "--overwrite")
    interrupt(process, lambda: any(tmp_path.glob(".good.*building/model.safetensors")), signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert tree(tmp_path) == before


def test_a_fork_of_eval_is_ended_as_soon_as_it_exists(
    dense: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's pools end what they have forked, and wait for it; a signal that one has lost is never repeated."""

    def measure(self: Evaluation) -> Iterator[None]:
        fork = os.fork()
        while fork == 0:
            time.sleep(PATIENCE)
        os.kill(fork, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(fork, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(fork, signal.SIGKILL)
            time.sleep(0.01)
        raise InputError(f"a fork was ended by {signal.Signals(ended[1]).name}")
        yield

    monkeypatch.setattr(Evaluation, "run", measure)
    assert "a fork was ended by SIGTERM" in refused("eval", dense, "--tasks", "story_endings")


def test_ctrl_c_while_learning_masks_loses_nothing(
    run: list[str], tmp_path: Path, refused: Refused, ok: Callable[..., str]
) -> None:
    command = [*run, "-o", str(tmp_path / "out"), "--method", "maskprune", "--sparsity", "0.3"]
    state = tmp_path / ".out.learning.safetensors"
    process = start(*command, "--steps", 4000, "--passes", 4000)
    _, err = interrupt(process, state.exists)
    assert process.returncode == 130
    assert err.endswith(INTERRUPTED) and f"{state} holds what was learned so far" in err
    assert not (tmp_path / "out").exists()
    assert "other settings" in refused(*command, "--steps", 20, "--resume") and state.exists()
    ok(*command, "--steps", 20, "--passes", 20)
    assert (tmp_path / "out" / "model.safetensors").exists() and not state.exists()
