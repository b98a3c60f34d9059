"""Where a bias can live, by family, and what becomes of it when the model is saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from tiny import WEIGHT_METHODS, make_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import PruneConfig, prune
from llmprune.biases import add_biases_, bias_flags
from llmprune.blocks import all_sites, survey
from llmprune.criteria import methods
from llmprune.sites import Site

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
BOTH_FLAGS = {"attention_bias": ATTENTION, "mlp_bias": MLP}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}

# Written down from the families' code: (what a flag can announce, what has a bias anyway).
CARRIERS: dict[str, tuple[dict[str, set[str]], set[str]]] = {
    "llama": (BOTH_FLAGS, set()),
    "granite": (BOTH_FLAGS, set()),
    "qwen3": ({"attention_bias": ATTENTION}, set()),
    "olmo2": ({"attention_bias": ATTENTION}, set()),
    "cohere": ({"attention_bias": ATTENTION}, set()),
    "gemma2": ({"attention_bias": ATTENTION}, set()),
    "qwen2": ({}, {"q_proj", "k_proj", "v_proj"}),
    "mistral": ({}, set()),
    "phi3": ({}, set()),
    "stablelm": ({"use_qkv_bias": {"q_proj", "k_proj", "v_proj"}}, set()),
    "opt": ({}, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "gpt2": ({}, {"c_attn", "c_proj", "c_fc"}),
    "falcon": ({"bias": NEOX}, set()),
}


def family(name: str) -> PreTrainedModel:
    return FAMILIES[name].build(**({"attention_bias": False} if name == "granite" else {}))


def sites_of(model: PreTrainedModel) -> list[Site]:
    return list(all_sites(survey(model)))


def roles(sites: list[Site]) -> set[str]:
    return {site.role for site in sites}


@pytest.mark.parametrize("name", CARRIERS)
def test_the_carriers_of_a_family(name: str) -> None:
    flags, present = CARRIERS[name]
    model = family(name)
    before = dict(model.config.to_dict())
    found = bias_flags(model)
    assert {flag: {layer.split(".")[-1] for layer in layers} for flag, layers in found.items()} == flags
    assert roles([site for site in sites_of(model) if site.bias is not None]) == present
    assert model.config.to_dict() == before  # probing leaves no trace
    blocks = len(survey(model))
    for layers in found.values():
        assert len(layers) == blocks * len({layer.split(".")[-1] for layer in layers})  # in every block


@pytest.mark.parametrize("name", CARRIERS)
def test_zero_biases_change_nothing_and_reload(name: str, windows: Tensor, tmp_path: Path) -> None:
    flags, present = CARRIERS[name]
    model = family(name)
    with torch.no_grad():
        dense = model(input_ids=windows).logits
        chosen = add_biases_(model, sites_of(model))
        assert set(chosen) == set(flags)
        assert torch.equal(model(input_ids=windows).logits, dense)
        carriers = [site for site in sites_of(model) if site.bias is not None]
        assert roles(carriers) == present.union(*flags.values())
        for site in carriers:
            assert site.bias is not None and site.bias.dtype == site.weight.dtype
            site.bias.add_(torch.randn(site.bias.shape))
        moved = model(input_ids=windows).logits
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(input_ids=windows).logits, moved)
    if carriers:
        assert not torch.equal(moved, dense)


def test_only_flags_that_help_the_chosen_sites_are_set(llama: PreTrainedModel) -> None:
    wanted = [site for site in sites_of(llama) if site.role == "down_proj"]
    assert add_biases_(llama, wanted) == ["mlp_bias"]
    assert llama.config.mlp_bias and not llama.config.attention_bias
    owners = roles([site for site in sites_of(llama) if site.bias is not None])
    assert owners == MLP  # the config speaks for all that it announces
    assert add_biases_(llama, wanted) == []  # a second time there is nothing to do
    assert add_biases_(llama, []) == []


def test_new_biases_are_like_the_weights() -> None:
    model = make_llama().to(torch.bfloat16)
    model.requires_grad_(False)
    add_biases_(model, sites_of(model))
    for site in sites_of(model):
        bias = site.module.bias
        assert bias.dtype == torch.bfloat16 and bias.shape == (site.shape[0],)
        assert not bias.any() and not bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["stade", "stade-w"])
def test_a_llama_pruned_by_stade_reloads_with_its_biases(
    method: str, dtype: torch.dtype, windows: Tensor, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path / "dense")  # loaded, not cast: a cast would round the rotary tables too
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    result = prune(model, PruneConfig(method=method, pattern="2:4"), tokens=windows)
    assert set(result.report.bias_flags) == set(BOTH_FLAGS)
    moved = {site.role for site in sites_of(model) if site.bias is not None and bool(site.bias.any())}
    assert moved == (ATTENTION | MLP if method == "stade" else {"o_proj", "down_proj"})
    assert not any("no bias" in warning for warning in result.report.warnings)
    model.save_pretrained(tmp_path / "pruned")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reloaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(input_ids=windows).logits, model(input_ids=windows).logits)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3"])
def test_a_model_without_carriers_gets_no_bias_and_a_warning(name: str, windows: Tensor) -> None:
    model = family(name)
    keys = set(model.state_dict())
    result = prune(model, PruneConfig(method="stade", sparsity=0.5), tokens=windows)
    assert result.report.bias_flags == [] and set(model.state_dict()) == keys
    noted = {site.name for block in result.report.blocks for site in block.sites if site.note == "no bias to move"}
    assert noted == {site.name for site in sites_of(model) if site.role not in CARRIERS[name][1]}
    assert [w for w in result.report.warnings if w.startswith(f"{len(noted)} sites have no bias")]


def test_without_a_carrier_stade_prunes_the_model_as_wanda_does(windows: Tensor) -> None:
    torch.manual_seed(0)
    ours = family("mistral")
    torch.manual_seed(0)
    theirs = family("mistral")
    prune(ours, PruneConfig(method="stade", sparsity=0.5), tokens=windows)
    prune(theirs, PruneConfig(method="wanda", sparsity=0.5), tokens=windows)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name


@pytest.mark.parametrize("method", [name for name in WEIGHT_METHODS if methods()[name].compensation == "none"])
def test_other_methods_add_no_bias(method: str, llama: PreTrainedModel, windows: Tensor) -> None:
    keys = set(llama.state_dict())
    assert prune(llama, PruneConfig(method=method, sparsity=0.5), tokens=windows).report.bias_flags == []
    assert set(llama.state_dict()) == keys and not llama.config.attention_bias
