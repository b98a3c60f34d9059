"""Tasks of lm-eval and greedy continuations: the figures, what is kept, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken import OVERFLOWING, word_tokenizer, words
from corpus import strict_json
from llmprune_eval.generation import repetition
from llmprune_eval.result import Result
from test_launch import launch
from tiny import ROOT
from transformers import AutoModelForCausalLM

Ok = Callable[..., str]
Refused = Callable[..., str]
Cli = Callable[..., tuple[int, str, str]]

YAML = """
task: {name}
dataset_path: {source}
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
DOCUMENTS = [
    {"query": words(5, 10 * i), "choices": [words(n + 1, 10 * i + n) for n in range(3)], "gold": i % 3}
    for i in range(1, 14)
]


@pytest.fixture
def own(tmp_path: Path, dense: Path) -> Path:
    """A folder with the tasks `first_words` and `second_words`, both on one local file; lm-eval wants an end token."""
    pytest.importorskip("lm_eval")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(dense)
    folder = tmp_path / "own"
    folder.mkdir()
    file = folder / "words.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name in ("first_words", "second_words"):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, source="json", file=file))
    return folder


def by_hand(folder: Path) -> tuple[list[bool], list[bool]]:
    """Which documents are answered rightly by likelihood, and by likelihood per character."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    right, right_by_length = [], []
    for document in DOCUMENTS:
        scores = []
        for choice in document["choices"]:
            ids = [int(word[1:]) for word in f"{document['query']} {choice}".split()]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logits[t - 1, ids[t]].item() for t in range(5, len(ids))))
        each = [score / len(choice) for score, choice in zip(scores, document["choices"], strict=True)]
        right.append(scores.index(max(scores)) == document["gold"])
        right_by_length.append(each.index(max(each)) == document["gold"])
    return right, right_by_length


def test_figures_equal_those_of_lm_eval_itself_and_a_loop(dense: Path, own: Path, tmp_path: Path, ok: Ok) -> None:
    facts = strict_json(ok("eval", dense, "--tasks", "first_words", "--include-path", own, "--json"))
    (part,) = facts["parts"]
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={dense}", "--device", "cpu",
               "--tasks", own / "first_words.yaml", "--output_path", tmp_path / "theirs"]  # fmt: skip
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, cwd=tmp_path, timeout=300)
    theirs = json.loads(next((tmp_path / "theirs").rglob("*.json")).read_text())["results"]["first_words"]
    for metric, right in zip(("acc", "acc_norm"), by_hand(dense), strict=True):
        assert part["values"][metric] == theirs[f"{metric},none"] == pytest.approx(sum(right) / len(right))
        assert part["stderr"][metric] == theirs[f"{metric}_stderr,none"]
        mean = sum(right) / len(right)
        assert part["stderr"][metric] == pytest.approx(math.sqrt(mean * (1 - mean) / (len(right) - 1)))
    expected = {"version": 3.0, "num_fewshot": 0, "limit": None, "samples": 13, "dtype": "float32", "split": "test"}
    assert part["protocol"] | expected == part["protocol"]
    assert "mean acc" not in facts


def test_what_is_finished_is_kept_and_not_measured_again(
    dense: Path, own: Path, tmp_path: Path, cli: Cli, ok: Ok, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = YAML.format(name="second_words", source="someone/something", file="a.jsonl")
    good = (own / "second_words.yaml").read_text()
    (own / "second_words.yaml").write_text(away)
    command = ("eval", dense, "--tasks", "first_words,second_words", "--include-path", own, "--limit", 6, "--json",
               "--output", tmp_path / "result.json")  # fmt: skip
    code, out, err = cli(*command)
    assert code == 2 and len(err.splitlines()) == 1
    assert "llmprune: task second_words cannot be loaded" in err and "without a network" in err
    (shown,) = strict_json(out)["parts"]
    (kept,) = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert shown == kept and kept["name"] == "first_words"

    (own / "second_words.yaml").write_text(good)
    facts = strict_json(ok(*command))
    first, second = facts["parts"]
    assert first == kept and second["name"] == "second_words"
    assert second["values"] == first["values"] and second["protocol"]["samples"] == 6
    assert facts["mean acc"] == first["values"]["acc"]
    monkeypatch.setattr("lm_eval.simple_evaluate", None)
    assert strict_json(ok(*command)) == facts
    table = ok(*(word for word in command if word != "--json"))
    for wanted in ("mean acc", "LIMITED to 6", "second_words 3.0", f"{first['values']['acc_norm']:.4f} ± "):
        assert wanted in table

    with (own / "words.jsonl").open("a") as file:  # other data is another measurement
        file.write(json.dumps(DOCUMENTS[0]) + "\n")
    code, _, err = cli(*command)
    assert code == 2 and "task first_words failed in lm-eval (TypeError" in err


@pytest.mark.usefixtures("unproved")
def test_a_folder_that_llmprune_wrote_keeps_its_result(dense: Path, own: Path, data: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", "--method", "magnitude")
    ok("eval", "out", "--tasks", "first_words", "--include-path", own, "--limit", 2)
    text = ok("eval", "out", "--dataset", data / "a.npy", "--device-map", "auto", "--batch-size", "auto")
    kept = json.loads(Path("out", "evaluation.json").read_text())
    assert [part["kind"] for part in kept["parts"]] == ["task", "perplexity"]
    assert "out/evaluation.json" in text
    card = Path("out", "README.md").read_text()
    assert "first_words" in card and f"{kept['parts'][1]['values']['perplexity']:.4g}" in card


def test_likelihoods_that_are_nan(dense: Path, own: Path, refused: Refused) -> None:
    OVERFLOWING["in a block"][0](dense)
    said = refused("eval", dense, "--tasks", "first_words", "--include-path", own)
    assert "task first_words: the model's likelihoods are NaN" in said


@pytest.mark.usefixtures("own")
def test_unknown_tasks_are_told_near_names(dense: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused("eval", dense, "--tasks", "first_wrods,arc_esay", "--include-path", tmp_path / "own")
    assert "task 'first_wrods' is unknown to lm-eval: did you mean first_words" in said


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), "nothing to measure was asked for"),
        (("--tasks", "story_endings", "--against", "x"), "--against compares two models on a text"),
        (("--suite", "nonesuch"), "suite 'nonesuch' is unknown: use one of wanda"),
        (("--generate", "--batch-size", "many"), "--batch-size many: give a number of at least 1, or auto"),
        (("--generate", "--limit", "0"), "--limit 0.0: give a number of documents"),
        (("--tasks", "a", "--include-path", "absent"), "--include-path absent is no folder"),
        (("--prompt", ""), "has no tokens: give one with text in it"),
        (("--prompt", "w1 w2", "--max-new-tokens", "63"), "exceed the model's 64 positions"),
    ],
)
def test_options_that_make_no_sense(options: tuple[str, ...], wanted: str, dense: Path, refused: Refused) -> None:
    assert wanted in refused("eval", dense, *options)


@pytest.mark.usefixtures("own")
def test_a_tokenizer_without_start_and_end(dense: Path, own: Path, refused: Refused) -> None:
    word_tokenizer().save_pretrained(dense)
    said = refused("eval", dense, "--tasks", "first_words", "--include-path", own)
    assert "has neither start nor end token" in said


def test_a_data_file_that_is_not_there(dense: Path, own: Path, refused: Refused) -> None:
    (own / "words.jsonl").unlink()
    said = refused("eval", dense, "--tasks", "first_words", "--include-path", own)
    assert "task first_words reads" in said and "which does not exist" in said


def test_two_processes_give_the_figures_of_one(dense: Path, own: Path, data: Path, ok: Ok) -> None:
    options = (dense, "--tasks", "first_words", "--include-path", own, "--dataset", data / "a.npy", "--prompt", "w1 w2",
               "--device", "cpu", "--json")  # fmt: skip
    done = launch(*options, module="llmprune_eval")
    assert done.returncode == 0, done.stderr
    together, alone = (strict_json(text)["parts"] for text in (done.stdout, ok("eval", *options)))
    assert [part["kind"] for part in together] == ["perplexity", "task", "generation"]
    for one, other in zip(together, alone, strict=True):
        assert one["protocol"] == other["protocol"]
        assert one["values"].keys() == other["values"].keys()
        for metric, value in one["values"].items():  # a text of fewer than four tokens has no repetition
            expected = other["values"][metric]
            assert value == (expected and pytest.approx(expected, rel=1e-6))
        assert one["samples"] == other["samples"]


def test_repetition() -> None:
    assert repetition([1, 2, 3]) is None
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2] * 4) == pytest.approx(3 / 5)


def test_continuations_are_greedy_whatever_the_checkpoint_says(dense: Path, ok: Ok) -> None:
    (dense / "generation_config.json").write_text(json.dumps({"do_sample": True, "repetition_penalty": 5.0}))
    facts = strict_json(ok("eval", dense, "--prompt", "w1 w2 w3", "--max-new-tokens", 20, "--json"))
    (part,) = facts["parts"]
    model, ids = AutoModelForCausalLM.from_pretrained(dense), [1, 2, 3]
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (sample,) = part["samples"]
    assert sample["text"] == " ".join(f"w{i}" if i else "<unk>" for i in ids[3:]).replace("<unk> ", "")
    grams = {tuple(ids[i : i + 4]) for i in range(3, 20)}
    assert part["values"] == {"repetition": pytest.approx(1 - len(grams) / 17), "tokens": 20}
    assert "w1 w2 w3 [...]" in ok("eval", dense, "--prompt", "w1 w2 w3")


def test_another_tokenizer_is_another_measurement(dense: Path, ok: Ok, tmp_path: Path) -> None:
    command = ("eval", dense, "--prompt", "w1 w2 w3", "--max-new-tokens", 4, "--output", tmp_path / "r.json", "--json")
    first, again = (strict_json(ok(*command))["parts"][0] for _ in range(2))
    assert again == first
    text = (dense / "tokenizer.json").read_text(encoding="utf-8")
    (dense / "tokenizer.json").write_text(text.replace('"w1"', '"x1"'), encoding="utf-8")
    other = strict_json(ok(*command))["parts"][0]
    assert other["protocol"]["tokenizer_sha256"] != first["protocol"]["tokenizer_sha256"]
    assert len(Result.read(tmp_path / "r.json").parts) == 2


@pytest.mark.usefixtures("unproved")
def test_the_dense_model_continues_the_same_prompts(dense: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", "--method", "random", "--sparsity", 0.5)
    prompts = ("--prompt", "w1 w2 w3", "--prompt", "w7 w8", "--max-new-tokens", 12, "--json")
    (own,) = strict_json(ok("eval", dense, *prompts))["parts"]
    (part,) = strict_json(ok("eval", "out", *prompts, "--against", dense))["parts"]
    assert [row["dense_text"] for row in part["samples"]] == [row["text"] for row in own["samples"]]
    assert [row["text"] for row in part["samples"]] != [row["text"] for row in own["samples"]]
    assert part["values"]["dense_repetition"] == own["values"]["repetition"]
    assert part["protocol"]["against"] == str(dense) and own["protocol"]["against"] is None


@pytest.mark.usefixtures("unproved")
def test_the_embedded_model_knows_its_stories_and_a_ruined_one_does_not(ok: Ok) -> None:
    pytest.importorskip("lm_eval")
    model = ROOT / "llmprune" / "demo" / "model"
    ok("prune", model, "-o", "out", "--method", "random", "--sparsity", 0.5, "--dtype", "float32")
    command = ("--tasks", "story_endings", "--dtype", "float32", "--json")
    kept, ruined = (strict_json(ok("eval", folder, *command))["parts"][0] for folder in (model, "out"))
    assert kept["values"]["acc"] > 0.25 + 5 * kept["stderr"]["acc"]
    assert ruined["values"]["acc"] < kept["values"]["acc"] - 3 * kept["stderr"]["acc"]


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "lambada", "winogrande", "openbookqa"])
def test_the_tasks_for_local_files_run(name: str, shared: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    pytest.importorskip("lm_eval")
    assert shared == ROOT.parent / "shared"
    monkeypatch.chdir(ROOT)
    code, out, err = cli("eval", shared / "models" / "tinystories-llama-1m", "--tasks", f"local_{name}", "--limit", 8,
                         "--include-path", "eval/tasks", "--json")  # fmt: skip
    assert code == 0, err
    (part,) = strict_json(out)["parts"]
    assert 0 <= part["values"]["acc"] <= 1 and part["protocol"]["samples"] == 8
    assert len(part["protocol"]["revision"]) == 64 and not os.path.exists("evaluation.json")
