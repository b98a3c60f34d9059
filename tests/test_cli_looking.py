"""The commands that only look: what is in a folder, and how well it scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import LENGTH, SITES, WINDOWS, log_probabilities, strict_json
from llmprune_eval.result import weights_sha256
from tiny import make_llama

Ok = Callable[..., str]


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize(("options", "pattern", "sparsity"), [
    ("--pattern 2:4", "2:4", 0.5), ("--pattern 1:4", "1:4", 0.75), ("--sparsity 0.25", "unstructured", 0.25),
])  # fmt: skip
def test_inspect_shows_what_is_there(
    options: str, pattern: str, sparsity: float, dense: Path, data: Path, ok: Ok
) -> None:
    ok("prune", dense, "-o", "out", "--method", "wanda", "--dataset", data / "a.npy", *options.split())
    facts = strict_json(ok("inspect", "out", "--json"))
    assert facts["patterns"] == [pattern]
    assert facts["sparsity"] == pytest.approx(sparsity)
    assert [site["name"] for site in facts["sites"]] == SITES
    assert {site["sparsity"] for site in facts["sites"]} == {sparsity}
    assert facts["manifest"]["config"]["method"] == "wanda"
    table = ok("inspect", "out")
    for part in (SITES[-1], "32 x 68", f"{sparsity:.2%}", pattern, "manifest    wanda", f"seed 0, from {dense}"):
        assert part in table


@pytest.mark.usefixtures("unproved")
def test_inspect_shows_the_widths_of_a_smaller_model(dense: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", *"--method magnitude --pattern uniform --sparsity 0.3 --keep-heads".split())
    channels = json.loads(Path("out", "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    said = ok("inspect", "out")
    assert f"every block keeps {channels} of 68 channels (mlp.down_proj)" in said
    assert "left alone  self_attn.o_proj: kept as asked" in said


def test_inspect_of_a_dense_model(dense: Path, ok: Ok) -> None:
    facts = strict_json(ok("inspect", dense, "--json"))
    assert (facts["sparsity"], facts["patterns"], facts["manifest"]) == (0, ["dense"], None)
    assert "not written by llmprune" in ok("inspect", dense)


@pytest.mark.usefixtures("unproved")
def test_eval_against_a_computation_in_float64(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", "--method", "magnitude")
    command = ("--dataset", data / "a.txt", "--max-seq-length", LENGTH, "--batch-size", 4)
    (alone,) = strict_json(ok("eval", "out", *command, "--json"))["parts"]
    (both,) = strict_json(ok("eval", "out", "--against", dense, *command, "--json"))["parts"]

    own, reference = (log_probabilities(folder, WINDOWS) for folder in (tmp_path / "out", dense))
    labels = WINDOWS[:, 1:, None]
    perplexity, dense_perplexity = (p.gather(-1, labels).mean().neg().exp().item() for p in (own, reference))
    values = both["values"]
    assert alone["values"] == {"perplexity": values["perplexity"]}
    assert values["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert values["dense_perplexity"] == pytest.approx(dense_perplexity, rel=1e-5)
    kl = (reference.exp() * (reference - own)).sum(-1).mean().item()
    assert values["kl"] == pytest.approx(kl, rel=1e-4)
    assert values["top1_agreement"] == (own.argmax(-1) == reference.argmax(-1)).double().mean().item()
    assert alone["protocol"] | {"against": None, "against_sha256": None} == alone["protocol"]
    assert (both["protocol"]["against"], both["protocol"]["against_sha256"]) == (str(dense), weights_sha256(dense))
    text = data / "a.txt"
    expected = {
        "dataset": str(text), "revision": hashlib.sha256(text.read_bytes()).hexdigest(), "split": None, "joiner": "\n",
        "seqlen": LENGTH, "stride": LENGTH, "windows": 25, "tokens": 25 * (LENGTH - 1), "dtype": "float32",
        "bos": "none",
    }  # fmt: skip
    assert alone["protocol"] | expected == alone["protocol"]

    table = ok("eval", "out", "--against", dense, *command)
    for part in (
        f"{values['perplexity']:.4f}",
        f"{values['dense_perplexity']:.4f}",
        "KL to dense",
        "same top-1",
        "25 non-overlapping",
    ):
        assert part in table


def test_ready_windows_are_scored_without_a_tokenizer(saved_llama: Path, data: Path, ok: Ok) -> None:
    (part,) = strict_json(ok("eval", saved_llama, "--dataset", data / "a.npy", "--num-samples", 5, "--json"))["parts"]
    chosen = log_probabilities(saved_llama, WINDOWS[:5]).gather(-1, WINDOWS[:5, 1:, None])
    assert part["values"]["perplexity"] == pytest.approx(chosen.mean().neg().exp().item(), rel=1e-5)
    assert (part["protocol"]["windows"], part["protocol"]["joiner"]) == (5, None)
    assert "ready windows, 5 non-overlapping" in ok(
        "eval", saved_llama, "--dataset", data / "a.npy", "--num-samples", 5
    )


def test_eval_of_a_model_against_itself(dense: Path, data: Path, ok: Ok) -> None:
    facts = json.loads(
        ok("eval", dense, "--against", dense, "--dataset", data / "a.jsonl", "--num-samples", 3, "--json")
    )
    values = facts["parts"][0]["values"]
    assert (values["kl"], values["top1_agreement"], facts["parts"][0]["protocol"]["windows"]) == (0.0, 1.0, 3)
    assert values["perplexity"] == values["dense_perplexity"]


@pytest.mark.usefixtures("unproved")
def test_eval_borrows_the_tokenizer_of_the_dense_model(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    make_llama().save_pretrained(tmp_path / "bare")
    facts = strict_json(ok("eval", "bare", "--against", dense, "--dataset", data / "a.parquet", "--json"))
    assert facts["parts"][0]["protocol"]["windows"] == 400 // 64
