"""The result file: what is kept, what is taken as done, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmprune_eval import InputError
from llmprune_eval.result import SCHEMA, Part, Result, check_place, describe_model, weights_sha256
from transformers import PreTrainedModel

MODEL = {"name": "a", "weights_sha256": "1" * 64}
ASKED = {"seqlen": 24, "dtype": "float32"}


def part(value: float | None = 3.5, **protocol: object) -> Part:
    return Part("perplexity", "text.jsonl", {**ASKED, "tokens": 230, **protocol}, {"perplexity": value})


def test_what_was_added_is_found_again_by_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    Result.open(path, MODEL).add(part())
    again = Result.open(path, MODEL)
    assert again.find("perplexity", "text.jsonl", ASKED) == part()
    for kind, name, asked in (
        ("task", "text.jsonl", ASKED),
        ("perplexity", "other", ASKED),
        ("perplexity", "text.jsonl", {**ASKED, "seqlen": 25}),
        ("perplexity", "text.jsonl", {**ASKED, "bos": True}),
    ):
        assert again.find(kind, name, asked) is None
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


def test_the_same_protocol_is_replaced_and_another_is_kept(tmp_path: Path) -> None:
    result = Result.open(tmp_path / "evaluation.json", MODEL)
    for new in (part(3.5), part(4.5, seqlen=25), part(None)):
        result.add(new)
    assert [p.values["perplexity"] for p in Result.read(tmp_path / "evaluation.json").parts] == [4.5, None]


def test_the_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    Result.open(path, MODEL).add(part())
    with pytest.raises(InputError, match=r"measurements of another model \(a\): name another file"):
        Result.open(path, {**MODEL, "weights_sha256": "2" * 64})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 1, "model": {}, "parts": [{"kind": "x"}]}', "\xff"])
def test_a_damaged_file(content: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="is no result of an evaluation"):
        Result.read(path)
    path.write_text(json.dumps({"schema": SCHEMA + 1, "model": MODEL, "parts": []}), encoding="utf-8")
    with pytest.raises(InputError, match=f"has schema {SCHEMA + 1}, and this version reads {SCHEMA}: measure again"):
        Result.read(path)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        Result(MODEL, path=tmp_path / "file" / "evaluation.json").add(part())


def test_a_model_is_known_by_its_weights(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    first = describe_model(str(tmp_path / "model"), llama)
    assert first["parameters"] == sum(p.numel() for p in llama.parameters())
    assert first["bytes"] == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert first["manifest_sha256"] is None
    weight = next(llama.parameters())
    weight.data[0, 0] += 1
    llama.save_pretrained(tmp_path / "model")
    assert weights_sha256(tmp_path / "model") != first["weights_sha256"]


def test_two_writers_keep_each_other_s_parts(tmp_path: Path) -> None:
    one, other = (Result.open(tmp_path / "evaluation.json", MODEL) for _ in range(2))
    one.add(part(1.0, seqlen=10))
    other.add(part(2.0, seqlen=20))
    one.add(part(3.0, seqlen=30))
    assert [p.values["perplexity"] for p in Result.read(tmp_path / "evaluation.json").parts] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("damage", [
    {"kind": "zzz"}, {"values": []}, {"values": {"acc": "abc"}}, {"protocol": None}, {"stderr": None}, {"samples": {}},
])  # fmt: skip
def test_a_damaged_part(damage: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    Result.open(path, MODEL).add(part())
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["parts"][0] |= damage
    path.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(InputError, match="is no result of an evaluation"):
        Result.read(path)


def test_a_link_to_a_result_stays_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    Result(MODEL, path=link).add(part())
    assert link.is_symlink() and Result.read(tmp_path / "real.json").parts == [part()]


def test_a_place_that_cannot_hold_a_result_is_found_beforehand(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "deep" / "result.json")
    for place, said in ((tmp_path, "is a folder: name a file"), (Path("/dev/null"), "cannot be written")):
        with pytest.raises(InputError, match=said):
            check_place(place)
