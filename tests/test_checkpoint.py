"""The written folder: plain, proved, atomic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import InputError, PruneConfig, PruneResult, prune
from llmprune.checkpoint import check_target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def pruned(llama: PreTrainedModel, windows: torch.Tensor) -> PruneResult:
    return prune(llama, PruneConfig(method="stade", pattern="2:4"), tokens=windows, holdout=windows[:2])


@pytest.mark.usefixtures("fresh_process")
def test_a_saved_model_reloads_plainly_with_its_biases(
    pruned: PruneResult, windows: torch.Tensor, tmp_path: Path
) -> None:
    folder = pruned.save(tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.attention_bias is True
    assert model.config.mlp_bias is True
    with torch.no_grad():
        assert torch.equal(model(windows).logits, pruned.model(windows).logits)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_config_announces_nothing_that_a_runtime_could_refuse(pruned: PruneResult, tmp_path: Path) -> None:
    config = json.loads((pruned.save(tmp_path / "out") / "config.json").read_text())
    assert "sparsity_config" not in config
    assert "quantization_config" not in config


def test_the_manifest_tells_the_whole_run(pruned: PruneResult, tmp_path: Path) -> None:
    manifest = json.loads((pruned.save(tmp_path / "out") / "llmprune.json").read_text())
    assert manifest["config"]["method"] == "stade"
    assert manifest["pattern"] == "2:4"
    assert manifest["calibration"]["windows_used"] == 11
    assert len(manifest["calibration"]["sha256"]) == 64
    assert manifest["reload"]["weights"] == "identical"
    assert manifest["versions"]["torch"] == torch.__version__
    sites = [site for block in manifest["blocks"] for site in block["sites"]]
    assert len(sites) == 21
    for site in sites:
        rows, columns = site["shape"]
        assert site["pruned"] * 2 == rows * columns
        assert 0 < site["relative_error"] < 1
    assert manifest["perplexity_after"] != manifest["perplexity_before"]


def test_tied_weights_stay_tied(windows: torch.Tensor, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    folder = prune(model, PruneConfig(), tokens=windows).save(tmp_path / "out")
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype, windows: torch.Tensor, tmp_path: Path) -> None:
    result = prune(make_llama().to(dtype), PruneConfig(method="sparsegpt"), tokens=windows)
    assert AutoModelForCausalLM.from_pretrained(result.save(tmp_path / "out"), dtype="auto").dtype == dtype


def test_an_existing_folder_is_replaced_only_when_asked(pruned: PruneResult, tmp_path: Path) -> None:
    folder = pruned.save(tmp_path / "out")
    (folder / "stale.txt").write_text("from before")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="exists"):
        pruned.save(folder)
    assert contents(tmp_path) == before
    pruned.save(folder, overwrite=True)
    assert not (folder / "stale.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_folder_that_is_no_model_is_never_replaced(pruned: PruneResult, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="no model folder"):
        pruned.save(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


def test_a_model_that_does_not_reload_is_never_called_finished(
    pruned: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias that the config does not announce vanishes on reload; the proof must notice."""
    good = contents(pruned.save(tmp_path / "out"))
    pruned.model.config.mlp_bias = False
    with pytest.raises(RuntimeError, match="unexpected weights"):
        pruned.save(tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == good
    assert {path.name for path in tmp_path.iterdir()} == {"out"}

    pruned.model.config.mlp_bias = True
    save = pruned.model.save_pretrained

    def tamper(folder: Path) -> None:
        with torch.no_grad():
            weight = pruned.model.get_input_embeddings().weight
            weight[0, 0] += 1.0
            save(folder)
            weight[0, 0] -= 1.0

    monkeypatch.setattr(pruned.model, "save_pretrained", tamper)
    with pytest.raises(RuntimeError, match="other weights"):
        pruned.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_target_is_checked_before_any_work(tmp_path: Path) -> None:
    model = tmp_path / "models" / "dense"
    model.mkdir(parents=True)
    for target in (model, tmp_path / "models", tmp_path / "models" / "x" / ".." / "dense"):
        with pytest.raises(InputError, match="input model"):
            check_target(target, True, str(model))
    with pytest.raises(InputError, match="free"):
        check_target(tmp_path / "new", False, size=10**18)
    assert not (tmp_path / "new").exists()
