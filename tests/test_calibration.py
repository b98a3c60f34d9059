"""Calibration windows: always full, drawn by a seed, never shared with the holdout."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from letters import Letters
from llmprune_eval.windows import model_positions, window_length
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmprune.calibration import Calibration, load_windows
from llmprune.config import PruneConfig
from llmprune.errors import InputError

LENGTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def numbered(count: int) -> str:
    """A text whose every window can be found again: numbers of five digits."""
    return "".join(f"{i:05d}" for i in range(count))


def config(dataset: object, samples: int = 10, holdout: int = 4, **changes: object) -> PruneConfig:
    settings: dict[str, object] = {"max_seq_length": LENGTH, "batch_size": 4, **changes}
    return PruneConfig(dataset=str(dataset), num_calibration_samples=samples, num_holdout_samples=holdout, **settings)


def texts_of(windows: Tensor) -> list[str]:
    return [Letters().text(row) for row in windows.tolist()]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A text of 62.5 windows."""
    path = tmp_path / "plain.txt"
    path.write_text(numbered(200), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """40 documents, each of one letter of its own; those of odd number are longer than a window."""
    path = tmp_path / "c4.jsonl"
    letters = (LETTERS + LETTERS.upper())[:40]
    lines = [json.dumps({"text": letter * (20 + i if i % 2 else LENGTH)}) for i, letter in enumerate(letters)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_joined_text_gives_different_aligned_full_windows(llama: PreTrainedModel, plain: Path) -> None:
    calibration = load_windows(config(plain), llama, Letters())
    assert calibration.windows.shape == (10, LENGTH) and calibration.holdout.shape == (4, LENGTH)
    assert calibration.windows.dtype == torch.int64
    found = texts_of(torch.cat([calibration.windows, calibration.holdout]))
    assert len(set(found)) == 14  # so the holdout is disjoint
    whole = numbered(200)
    pieces = [whole[i : i + LENGTH] for i in range(0, len(whole) - LENGTH + 1, LENGTH)]
    assert set(found) < set(pieces)
    assert found != sorted(found)  # in random order


def test_documents_longer_than_a_window_are_cut_at_random(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "c4.jsonl"
    texts = [numbered(n)[: 4 * n] for n in range(3, 43)]  # from 12 to 168 characters
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    calibration = load_windows(config(f"c4:{path}", 20, 5), llama, Letters())
    assert calibration.windows.shape == (20, LENGTH) and calibration.holdout.shape == (5, LENGTH)
    starts = []
    for window in texts_of(torch.cat([calibration.windows, calibration.holdout])):
        holders = [text for text in texts if window in text and len(text) > LENGTH]
        assert holders
        starts.append(holders[0].index(window))
    assert len(set(starts)) > 10 and any(start % LENGTH for start in starts)  # not the beginnings, not aligned


def test_one_cut_per_document_and_none_of_short_ones(llama: PreTrainedModel, documents: Path) -> None:
    calibration = load_windows(config(f"c4:{documents}", 12, 8), llama, Letters())
    found = texts_of(torch.cat([calibration.windows, calibration.holdout]))
    assert all(len(set(window)) == 1 for window in found)  # never across two documents
    long_ones = {letter for i, letter in enumerate((LETTERS + LETTERS.upper())[:40]) if i % 2}
    assert len(found) == 20 and {window[0] for window in found} == long_ones


@pytest.mark.parametrize("protocol", ["", "c4:"])
def test_the_seed_decides(protocol: str, llama: PreTrainedModel, plain: Path, documents: Path) -> None:
    dataset = f"c4:{documents}" if protocol else plain
    np.random.seed(1)
    torch.manual_seed(1)
    first = load_windows(config(dataset), llama, Letters())
    np.random.seed(2)
    torch.manual_seed(2)
    again, other = (load_windows(config(dataset, seed=seed), llama, Letters()) for seed in (0, 5))
    assert torch.equal(first.windows, again.windows) and torch.equal(first.holdout, again.holdout)
    assert not torch.equal(first.windows, other.windows)
    assert first.describe()["sha256"] == again.describe()["sha256"] != other.describe()["sha256"]


def test_the_windows_do_not_depend_on_how_many_are_held_out(llama: PreTrainedModel, plain: Path) -> None:
    with_none, with_some = (load_windows(config(plain, 10, k), llama, Letters()) for k in (0, 6))
    assert torch.equal(with_none.windows, with_some.windows) and len(with_none.holdout) == 0


@pytest.mark.parametrize("protocol", ["", "c4:"])
def test_of_a_short_text_an_eighth_is_held_out_with_a_warning(
    protocol: str, llama: PreTrainedModel, plain: Path, documents: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, available = (f"c4:{documents}", 20) if protocol else (plain, 62)
    with caplog.at_level(logging.WARNING, logger="llmprune"):
        none_left = load_windows(config(dataset, 200, 0), llama, Letters())
        assert none_left.windows.shape == (available, LENGTH) and len(none_left.holdout) == 0
        assert f"{available} windows: {available} calibrate (200 were asked for)" in caplog.text
        short = load_windows(config(dataset, available - 1, 9), llama, Letters())
        eighth = available // 8
        assert len(short.windows) == available - eighth and len(short.holdout) == eighth
        found = texts_of(torch.cat([short.windows, short.holdout]))
        assert len(set(found)) == available
        caplog.clear()
        enough = load_windows(config(dataset, available - 9, 9), llama, Letters())
        assert len(enough.windows) == available - 9 and len(enough.holdout) == 9 and not caplog.text


@pytest.mark.parametrize("protocol", ["", "c4:", "wikitext2:"])
def test_a_text_without_one_window_is_refused(protocol: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abc", encoding="utf-8")
    with pytest.raises(InputError, match="give more text"):
        load_windows(config(f"{protocol}{path}"), llama, Letters())


def test_the_digest_is_that_of_the_tokens_in_order() -> None:
    windows = torch.tensor([[1, 2], [3, 4], [5, 600]])
    facts = Calibration(windows, windows[:1], {"dataset": "x"}).describe()
    assert facts["sha256"] == hashlib.sha256(struct.pack("<6q", 1, 2, 3, 4, 5, 600)).hexdigest()
    assert (facts["dataset"], facts["windows_used"], facts["seqlen"], facts["holdout"]) == ("x", 3, 2, 1)
    for changed in (windows.flip(0), windows + 1, windows.view(2, 3).flip(1)):
        assert Calibration(changed, windows[:0]).describe()["sha256"] != facts["sha256"]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_ready_windows_are_used_as_they_are(llama: PreTrainedModel, tmp_path: Path, dtype: type) -> None:
    array = np.random.default_rng(0).integers(0, 97, (7, 20)).astype(dtype)
    np.save(tmp_path / "w.npy", array)
    path = tmp_path / "w.npy"
    whole = load_windows(config(path, 100, max_seq_length=None), llama, None)
    assert whole.windows.dtype == torch.int64 and len(whole.holdout) == 0
    assert np.array_equal(whole.windows.numpy(), array)
    part = load_windows(config(path, 3, seed=9, max_seq_length=20), llama, None)
    assert np.array_equal(part.windows.numpy(), array[:3])
    assert np.array_equal(part.holdout.numpy(), array[3:7]), "what is left over is held out"


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros(5, dtype=np.int64), "integer token ids"),
        (np.zeros((2, 20)), "integer token ids"),
        (np.zeros((2, 3, 20), dtype=np.int64), "integer token ids"),
        (np.zeros((0, 16), dtype=np.int64), "at least 1 of two tokens"),
        (np.zeros((3, 1), dtype=np.int64), "at least 1 of two tokens"),
        (np.zeros((3, 15), dtype=np.int64), "leave out --max-seq-length 16"),
        (np.full((3, 16), 97), "vocabulary ends at 96"),
        (np.full((3, 16), -1), "vocabulary ends at 96"),
    ],
)
def test_bad_ready_windows_are_explained(
    array: np.ndarray, complaint: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    np.save(tmp_path / "w.npy", array)
    with pytest.raises(InputError, match=complaint):
        load_windows(config(tmp_path / "w.npy"), llama, None)


def test_a_damaged_or_missing_npy_is_explained(llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "w.npy").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"cannot be read as \.npy"):
        load_windows(config(tmp_path / "w.npy"), llama, None)
    with pytest.raises(InputError, match="does not exist"):
        load_windows(config(tmp_path / "none.npy"), llama, None)


def test_windows_longer_than_the_positions_are_refused(llama: PreTrainedModel, plain: Path, tmp_path: Path) -> None:
    assert model_positions(llama) == 64
    assert [window_length(llama, asked) for asked in (None, 2, 64)] == [64, 2, 64]
    with pytest.raises(InputError, match="64 positions"):
        load_windows(config(plain, max_seq_length=65), llama, Letters())
    np.save(tmp_path / "w.npy", np.zeros((2, 65), dtype=np.int64))
    with pytest.raises(InputError, match="64 positions"):
        load_windows(config(tmp_path / "w.npy", max_seq_length=None), llama, None)


def test_a_foreign_tokenizer_and_a_missing_one_are_noticed(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    class Foreign(Letters):
        def ids(self, text: str) -> list[int]:
            return [1000 if letter == "z" else 5 for letter in text]

    path.write_text("ab" * 100 + "z" + "ab" * 11, encoding="utf-8")
    for seed in range(8):  # the one unknown token falls into calibration or holdout: it is noticed in both
        with pytest.raises(InputError, match="tokenizer that belongs to the model"):
            load_windows(config(path, 10, 4, seed=seed), llama, Foreign())
    with pytest.raises(InputError, match="no tokenizer"):
        load_windows(config(path), llama, None)
    with pytest.raises(InputError, match="no calibration data"):
        load_windows(PruneConfig(), llama, Letters())


@pytest.mark.parametrize("tokenizer", [None, Letters(bos=True)])
def test_a_model_can_write_its_own_windows(llama: PreTrainedModel, tokenizer: Letters | None) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    calibration = load_windows(config("self", 6, 3), llama, tokenizer)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(8)
    again, other = (load_windows(config("self", 6, 3, seed=seed), llama, tokenizer) for seed in (0, 1))
    windows = torch.cat([calibration.windows, calibration.holdout])
    assert windows.shape == (9, LENGTH)
    assert int(windows.min()) >= 0 and int(windows.max()) < 97
    assert len({tuple(row) for row in windows.tolist()}) == 9
    assert windows[:, 0].tolist() == [0 if tokenizer else llama.config.bos_token_id] * 9
    assert torch.equal(calibration.windows, again.windows) and torch.equal(calibration.holdout, again.holdout)
    assert not torch.equal(calibration.windows, other.windows)


def test_what_a_model_writes_is_never_cut_short_by_its_end_token(llama: PreTrainedModel) -> None:
    llama.generation_config.eos_token_id = list(range(90))  # nearly every token would end the text
    calibration = load_windows(config("self", 5, 0, max_seq_length=64), llama, None)
    assert calibration.windows.shape == (5, 64)


@pytest.mark.parametrize("start", [None, 50256])
def test_without_a_start_token_of_its_own_a_model_starts_anywhere(start: int | None, llama: PreTrainedModel) -> None:
    llama.config.bos_token_id = start
    first = load_windows(config("self", 12, 0), llama, Letters()).windows[:, 0]
    assert len(first.unique()) > 3 and int(first.max()) < 97


def test_a_config_without_a_start_token_is_no_error() -> None:
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97, "n_positions": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **settings)).eval()
    del model.config.bos_token_id
    assert load_windows(config("self", 3, 0), model, None).windows.shape == (3, LENGTH)
