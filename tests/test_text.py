"""How datasets are named and read, and how texts become windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from letters import Letters
from llmprune_eval import text as module
from llmprune_eval.errors import InputError
from llmprune_eval.hub import HubTexts
from llmprune_eval.text import NAMED, Protocol, TextSource, joined_windows, open_text, token_ids

WIKITEXT = "\n = Title = \n\n A line . \n   \n Another . \n"
AS_ON_THE_HUB = ["", " = Title = \n", "", " A line . \n", "", " Another . \n"]


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_token_ids_are_one_row_of_int64() -> None:
    ids = token_ids(Letters(), "abc")
    assert ids.dtype == torch.int64 and ids.tolist() == Letters().ids("abc")
    assert token_ids(Letters(bos=True), "ab").tolist() == [0, *Letters().ids("ab")]  # added by the tokenizer itself
    assert token_ids(Letters(), "").tolist() == []


@pytest.mark.parametrize("length", [2, 7, 64, 205, 206])
def test_joined_windows_are_the_text_cut_in_pieces(length: int) -> None:
    texts = ["x" * 100, "", "y" * 50, "z" * 50]
    windows = joined_windows(texts, "\n\n", Letters(), length)
    whole = "\n\n".join(texts)
    assert windows.shape == (len(whole) // length, length)
    pieces = [whole[i * length : (i + 1) * length] for i in range(len(whole) // length)]
    assert [Letters().text(row.tolist()) for row in windows] == pieces


def test_the_joined_text_is_tokenised_once() -> None:
    windows = joined_windows(["ab", "cd", "ef"], " ", Letters(bos=True), 3)
    assert windows.tolist()[0][0] == 0 and sum(row.count(0) for row in windows.tolist()) == 1


def test_a_text_shorter_than_a_window_gives_none() -> None:
    assert joined_windows(["abc"], "\n", Letters(), 4).shape == (0, 4)


def test_a_plain_file_is_one_text(tmp_path: Path) -> None:
    source = open_text(str(written(tmp_path / "a.txt", WIKITEXT)), "train")
    assert list(source.texts) == [WIKITEXT]
    assert source.protocol == Protocol() and not source.protocol.cuts


def test_jsonl_and_parquet_hold_one_text_per_row(tmp_path: Path) -> None:
    texts = ["one", "two\nlines", "", "höhe"]
    lines = "".join(json.dumps({"text": text, "url": 1}) + "\n\n" for text in texts)
    jsonl = written(tmp_path / "a.jsonl", lines)
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "text": texts}), parquet)
    for path in (jsonl, parquet):
        assert list(open_text(str(path), "train").texts) == texts


def test_wikitext_lines_of_a_file_are_the_rows_of_the_hub(tmp_path: Path) -> None:
    path = written(tmp_path / "wiki.txt", WIKITEXT)
    source = open_text(f"wikitext2:{path}", "test")
    assert list(source.texts) == AS_ON_THE_HUB
    assert source.protocol is NAMED["wikitext2"]
    assert source.protocol.joiner == "\n\n" and not source.protocol.cuts
    assert "\n\n".join(AS_ON_THE_HUB).startswith("\n\n = Title = \n\n\n\n\n A line . \n")  # as the papers' code joins


def test_c4_of_a_file_is_cut_at_random(tmp_path: Path) -> None:
    path = written(tmp_path / "c4.jsonl", json.dumps({"text": "hello"}) + "\n")
    source = open_text(f"c4:{path}", "train")
    assert list(source.texts) == ["hello"] and source.protocol.cuts
    assert source.describe() == {"dataset": f"c4:{path}", "joiner": "\n", "windows": "random cuts of single texts"}


def test_hub_rows_follow_the_papers() -> None:
    c4, wiki = NAMED["c4"].hub, NAMED["wikitext2"].hub
    assert c4 is not None and wiki is not None
    assert c4["train"]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert c4["test"]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert wiki["test"] == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}


def test_reading_stops_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MINIMUM_CHARACTERS", 100)
    given = []

    def endless() -> Iterator[str]:
        while True:
            given.append("a" * 30)
            yield given[-1]

    assert len(TextSource("x", Protocol(), endless()).read(1)) == 4  # 100 characters at least
    assert len(given) == 4
    assert len(TextSource("x", Protocol(), endless()).read(10)) == 14  # 40 for each token
    assert TextSource("x", Protocol(), ["short"]).read(10**6) == ["short"]


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_a_source_without_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="holds no text"):
        TextSource("x", Protocol(), texts).read(10)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"caf\xe9", "UTF-8"),
        ("a.csv", b"text\nhello\n", "unknown kind"),
        ("a.npy", b"\x93NUMPY", "unknown kind"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}\n', 'line 2 has no string field "text"'),
        ("a.jsonl", b'["text"]\n', 'line 1 has no string field "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'line 1 has no string field "text"'),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
        ("a.parquet", b"PAR1 but not really", "cannot be read as parquet"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        open_text(str(path), "train").read(10)


def test_a_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    with pytest.raises(InputError, match=r"no column \"text\" but \['content'\]"):
        open_text(str(path), "train").read(10)


@pytest.mark.parametrize(
    "spec", ["missing.txt", "wikitext2:missing.txt", "c4:", "nothing", "a/b/c", "/no/where", "x:y.txt"]
)
def test_what_does_not_exist_is_refused_before_the_work_begins(spec: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_text(spec, "train")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file"):
        open_text(str(tmp_path), "train")


def test_the_hub_without_a_network_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(**arguments: object) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    for spec in ("c4", "wikitext2", "someone/something"):
        with pytest.raises(InputError, match=r"\(no route\): without a network"):
            open_text(spec, "train").read(10)


def test_hub_rows_are_read_by_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, object]] = []

    class Builder:
        base_path = f"hf://datasets/some/text@{'0123456789' * 4}/data"

        def __init__(self, **arguments: object) -> None:
            asked.append(arguments)
            self.path = arguments["path"]

        def as_streaming_dataset(self, **arguments: object) -> list[dict[str, object]]:
            asked.append(arguments)
            return [{"text": "a"}, {"text": "b"}] if self.path == "some/text" else [{"body": "a"}]

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    source = open_text("some/text", "test")
    assert source.read(10) == ["a", "b"]
    assert asked == [{"path": "some/text"}, {"split": "test"}]
    assert source.revision() == "0123456789" * 4
    with pytest.raises(InputError, match=r"no string column \"text\" but \['body'\]"):
        open_text("some/thing", "train").read(10)


def test_what_datasets_streams_is_read_as_its_file(data: Path) -> None:
    builder = {"path": "json", "data_files": {"test": str(data / "a.jsonl")}, "split": "test"}
    assert list(HubTexts("some/text", builder)) == list(open_text(str(data / "a.jsonl"), "test").texts)


def test_the_revision_of_a_file_is_the_hash_of_its_content(data: Path) -> None:
    expected = hashlib.sha256((data / "a.txt").read_bytes()).hexdigest()
    assert open_text(str(data / "a.txt"), "test").revision() == expected
    assert open_text(f"wikitext2:{data / 'a.txt'}", "test").revision() == expected
