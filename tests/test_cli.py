"""The command line on tiny models: what goes in by every door, and what comes out by every other."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import tree
from corpus import LENGTH, SITES, WINDOWS, log_probabilities, strict_json
from safetensors.torch import load_file
from tiny import WEIGHT_METHODS, make_llama
from torch import Tensor

from llmprune import checkpoint
from llmprune.cli import spread
from llmprune.config import PruneConfig
from llmprune.criteria import methods
from llmprune.demo import run as demo
from llmprune.least_squares import TOLERANCE

Ok = Callable[..., str]


def digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def pruned_sites(folder: Path) -> list[str]:
    """Names of the matrices with any zero in them."""
    state = weights(folder)
    return [name for name in SITES if bool((state[f"{name}.weight"] == 0).any())]


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.npy"])
def test_calibration_data_of_every_kind(name: str, dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    out = ok("prune", dense, "-o", "out", "--dataset", data / name, "--max-seq-length", LENGTH, "--nsamples", 10,
             "--num-holdout-samples", 4, "--seed", 3, "--json")  # fmt: skip
    facts = strict_json(out)
    drawn = torch.from_numpy(np.random.default_rng(3).permutation(len(WINDOWS)))
    order = torch.arange(len(WINDOWS)) if name == "a.npy" else drawn
    assert facts["calibration"]["sha256"] == digest(WINDOWS[order[:10]])
    assert facts["calibration"]["windows_used"] == 10
    assert facts["calibration"]["seqlen"] == LENGTH
    assert facts["calibration"]["holdout"] == 4
    held = log_probabilities(dense, WINDOWS[order[10:14]]).gather(-1, WINDOWS[order[10:14], 1:, None])
    assert facts["perplexity_before"] == pytest.approx(held.mean().neg().exp().item(), rel=1e-5)
    assert facts["perplexity_after"] > 0
    state = weights(tmp_path / "out")
    for site in SITES:
        weight = state[f"{site}.weight"]
        assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    manifest = strict_json((tmp_path / "out" / "llmprune.json").read_text())
    assert {key: value for key, value in facts.items() if key != "output"}.items() <= manifest.items()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.usefixtures("unproved")
def test_text_that_the_model_writes(saved_llama: Path, tmp_path: Path, ok: Ok) -> None:
    command = ("--dataset", "self", "--max-seq-length", LENGTH, "--nsamples", 5, "--num-holdout-samples", 2, "--json")
    first = strict_json(ok("prune", saved_llama, "-o", "out", *command))["calibration"]
    assert (first["windows_used"], first["seqlen"], first["holdout"]) == (5, LENGTH, 2)
    again = strict_json(ok("prune", saved_llama, "-o", "again", *command))["calibration"]
    other = strict_json(ok("prune", saved_llama, "-o", "other", *command, "--seed", 1))["calibration"]
    assert first["sha256"] == again["sha256"] != other["sha256"]


@pytest.mark.usefixtures("unproved")
def test_the_names_of_the_papers_scripts(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    rest = ("--dataset", data / "a.npy", "--json")
    old = ok("prune", dense, "--save_model", "old", "--prune_method", "magnitude", "--sparsity_ratio", 0.5,
             "--sparsity_type", "2:4", "--nsamples", 7, *rest)  # fmt: skip
    new = ok("prune", dense, "--output", "new", "--method", "magnitude", "--sparsity", 0.5, "--pattern", "2:4",
             "--num-calibration-samples", 7, *rest)  # fmt: skip
    assert strict_json(old)["config"] == strict_json(new)["config"]
    assert strict_json(old)["config"]["num_calibration_samples"] == 7
    assert strict_json(old)["config"]["pattern"] == "2:4"
    assert all(torch.equal(a, weights(tmp_path / "new")[name]) for name, a in weights(tmp_path / "old").items())


def test_a_dry_run_needs_no_weights_and_touches_nothing(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    (dense / "model.safetensors").unlink()
    before = tree(tmp_path)
    command = ("prune", dense, "--dry-run", "--ignore", "down_proj", "--sparsity", 0.25, "--dataset", data / "a.txt")
    out = ok(*command, "-o", "out")
    for part in ("model.layers.*.self_attn.q_proj", "32 x 32", "3 x down_proj: ignored as asked",
                 "lm_head", "1.67 forward passes", "128 windows of 64 tokens", "GB hidden states",
                 "nothing was touched"):  # fmt: skip
        assert part in out
    facts = strict_json(ok(*command, "--json"))
    assert tree(tmp_path) == before

    model = make_llama()
    decoder = sum(p.numel() for p in model.get_submodule("model.layers").parameters())
    assert [site["name"] for site in facts["sites"]] == [name for name in SITES if "down_proj" not in name]
    assert {tuple(site["shape"]) for site in facts["sites"]} == {(32, 32), (16, 32), (68, 32)}
    share = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 68 * 32) / decoder
    assert facts["decoder_parameters"] == decoder
    assert facts["model_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["share_of_decoder_at_sites"] == pytest.approx(share)
    assert facts["share_of_decoder_pruned"] == pytest.approx(share / 4)
    assert [skipped["name"] for skipped in facts["skipped"]] == [name for name in SITES if "down_proj" in name]
    assert facts["passes"] == pytest.approx(2 - 1 / 3)
    assert facts["memory_bytes"]["weights"] == 4 * facts["model_parameters"]
    assert facts["memory_bytes"]["hidden states"] == 128 * 64 * 32 * 4


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("", r".*"),
        ("--ignore down_proj --ignore layers.1.mlp.up_proj", r"(?!.*down_proj|.*1\.mlp\.up_proj)"),
        ("--targets q_proj --targets mlp.up_proj", r".*(q_proj|up_proj)"),
        ("--targets model.layers.2.self_attn.q_proj", r"model\.layers\.2\.self_attn\.q_proj"),
        (r"--targets re:.*\.[02]\.mlp", r".*\.[02]\.mlp"),
        (r"--ignore re:model\.layers\.1\.", r"(?!model\.layers\.1\.)"),
        ("--ignore model.layers.1 --ignore layers.2.mlp", r"model\.layers\.(0|2\.self_attn)\."),
        ("--targets mlp", r".*\.mlp\."),
        ("--targets Linear --ignore self_attn.o_proj", r"(?!.*o_proj)"),
    ],
)
def test_targets_and_ignore(options: str, wanted: str, dense: Path, tmp_path: Path, ok: Ok) -> None:
    out = ok("prune", dense, "-o", "out", "--method", "magnitude", "--json", *options.split())
    chosen = [name for name in SITES if re.match(wanted, name)]
    assert chosen
    assert pruned_sites(tmp_path / "out") == chosen
    facts = strict_json(out)
    assert [site["name"] for block in facts["blocks"] for site in block["sites"]] == chosen
    assert [skipped["name"] for skipped in facts["skipped"]] == [name for name in SITES if name not in chosen]
    before = weights(dense)
    for name, weight in weights(tmp_path / "out").items():
        assert torch.equal(weight, before[name]) == (name.removesuffix(".weight") not in chosen)


def test_refined_and_compensated_and_proved(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    common = ("prune", dense, "--dataset", data / "a.txt", "--pattern", "2:4", "--max-seq-length", LENGTH, "--json")
    plain = strict_json(ok(*common, "-o", "plain"))
    facts = strict_json(ok(*common, "-o", "out", "--refine", "swap", "--compensation", "least-squares"))
    assert (facts["config"]["refine"], facts["config"]["compensation"]) == ("swap", "least-squares")
    assert set(facts["bias_flags"]) == {"attention_bias", "mlp_bias"}
    assert plain["bias_flags"] == []
    residuals = [site["residual"] for block in facts["blocks"] for site in block["sites"]]
    assert all(0 < residual <= TOLERANCE for residual in residuals)
    errors = [
        [site["relative_error"] for block in run["blocks"][:1] for site in block["sites"]] for run in (facts, plain)
    ]
    assert all(ours < theirs for ours, theirs in zip(*errors, strict=True))
    assert strict_json(ok("inspect", "out", "--json"))["patterns"] == ["2:4"]
    table = ok(*common[:-1], "-o", "again", "--refine", "swap", "--compensation", "least-squares")
    assert "refined by swap, compensated by least-squares" in " ".join(table.split())
    plan = " ".join(ok(*common[:-1], "--dry-run", "--method", "regress").split())
    assert "site after site, towards the dense model's output: would prune" in plan
    assert "micro-batches that wait on the device" in plan


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_kept(dtype: str, method: str, data: Path, tmp_path: Path, ok: Ok) -> None:
    model: Any = make_llama()
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    ok("prune", "half", "-o", "out", "--method", method, "--pattern", "2:4", "--dataset", data / "a.npy")
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert pruned_sites(tmp_path / "out") == SITES


@pytest.mark.usefixtures("unproved")
def test_another_dtype_is_asked_for(dense: Path, tmp_path: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", "--method", "magnitude", "--dtype", "bfloat16")
    assert {weight.dtype for weight in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_model_without_tokenizer_is_proved_and_replaced(
    saved_llama: Path, data: Path, tmp_path: Path, ok: Ok, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("prune", saved_llama, "-o", "out", "--dataset", data / "a.npy")
    with monkeypatch.context() as patch:  # one proof will do
        patch.setattr(checkpoint, "prove_reload", lambda model, folder: {})
        table = ok(*command)
    for part in ("wanda, 0.5; weights compete within a row", "model.layers.2", "50.00%", "saved", "reloaded"):
        assert part in table
    facts = strict_json(ok(*command, "--overwrite", "--sparsity", 0.75, "--json"))
    manifest = strict_json((tmp_path / "out" / "llmprune.json").read_text())
    assert manifest["reload"]["weights"] == "identical"
    assert manifest["sparsity"] == facts["sparsity"] == 0.75
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "dense", "out"}


def test_the_methods_are_listed(ok: Ok) -> None:
    table, facts = ok("methods"), strict_json(ok("methods", "--json"))
    assert list(facts) == list(methods())
    assert {"magnitude", "random", "ria", "sparsegpt", "stade", "stade-w", "wanda"} <= facts.keys()
    for (name, method), line in zip(methods().items(), table.splitlines(), strict=True):
        assert line.startswith(name)
        assert method.summary in line
        assert facts[name] == {"summary": method.summary, "source": method.source, "group": method.group}


def test_help_names_every_command(ok: Ok) -> None:
    out = ok("--help")
    assert all(name in out for name in ("prune", "eval", "inspect", "methods", "demo"))
    assert "--dataset" in ok("prune", "--help")


@pytest.mark.usefixtures("unproved")
def test_the_demo_speaks_json(ok: Ok, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PruneConfig(method="magnitude", pattern="2:4")
    monkeypatch.setattr(demo, "RUNS", [run])
    monkeypatch.setattr(demo, "PROVED", run)
    facts = strict_json(ok("demo", "--json"))
    assert [(row["method"], row["pattern"]) for row in facts["rows"]] == [("dense", ""), ("magnitude", "2:4")]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("prune M --ignore a b -o O", "prune M --ignore a --ignore b -o O"),
        ("prune M --ignore a --targets b c d", "prune M --ignore a --targets b --targets c --targets d"),
        ("prune M --ignore a --ignore b", "prune M --ignore a --ignore b"),
        ("prune --ignore a M", "prune --ignore a M"),
        ("methods", "methods"),
    ],
)
def test_several_patterns_may_follow_one_option(given: str, wanted: str) -> None:
    assert spread(given.split()) == wanted.split()


def test_the_folder_one_stands_in_is_replaced(
    dense: Path, tmp_path: Path, ok: Ok, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(dense, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    ok("prune", dense, "-o", ".", "--overwrite", "--method", "magnitude")
    assert (tmp_path / "here" / "llmprune.json").is_file()
