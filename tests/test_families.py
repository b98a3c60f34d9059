"""Every family of models, against a brute-force oracle and against what a reader of its code knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import Statistics, all_slots, check_against_brute_force, keep_by_size
from families import FAMILIES, MIXTURES, restored_state, tensors
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from llmprune import InputError, PruneConfig, prune
from llmprune.criteria.wanda import Wanda
from llmprune.report import Report, SiteReport
from llmprune.sites import Site

WANDA = PruneConfig(method="wanda", device="cpu", batch_size=4)
RELOADED = ("llama", "gpt2", "gemma3", "mixtral", "gpt_oss", "deepseek_v3")
SLIDING = ("mistral", "qwen2", "gemma2", "gemma3", "starcoder2", "mixtral", "gpt_oss")


pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", FAMILIES)


def site_reports(report: Report) -> dict[str, SiteReport]:
    return {site.name: site for block in report.blocks for site in block.sites}


@every_family
def test_statistics_masks_and_logits_match_brute_force(name: str, windows: Tensor, statistics: Statistics) -> None:
    family = FAMILIES[name]
    pruned = family.build()
    dense = copy.deepcopy(pruned)
    kept_by_size = {name: keep_by_size(slot.weight) for name, slot in all_slots(dense, family).items()}
    result = prune(pruned, WANDA, tokens=windows)
    slots = check_against_brute_force(dense, pruned, family, windows, statistics)
    assert {name: site.tokens for name, site in site_reports(result.report).items()} == {
        name: slot.tally.count for name, slot in slots.items()
    }
    assert {[part for part in name.split(".") if not part.isdigit()][-1] for name in slots} == family.sites
    # The test would say little if the inputs did not matter.
    moved = sum(int((slot.keep != kept_by_size[name]).sum()) for name, slot in slots.items())
    assert moved > 0.02 * sum(slot.keep.numel() for slot in slots.values())


@every_family
def test_nothing_else_changes(name: str, windows: Tensor) -> None:
    family = FAMILIES[name]
    model = family.build()
    model.train()
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    blocks[1].eval()
    blocks[2].forward = forward = blocks[2].forward  # as accelerate leaves one behind
    before, state = copy.deepcopy(tensors(model)), restored_state(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    report = prune(model, WANDA, tokens=windows).report

    assert restored_state(model) == state
    assert blocks[2].__dict__["forward"] is forward
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    if tied:
        assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    zeros = 0
    for key, tensor in tensors(model).items():
        changed = tensor != before[key]
        if changed.any():
            assert set(key.split(".")) & family.sites and key.startswith(family.blocks), key
            assert tensor.ndim > 1 and not tensor[changed].any(), key
            assert not torch.signbit(tensor[changed]).any(), key
            zeros += int(changed.sum())
    slots = all_slots(model, family)
    for site, slot in slots.items():
        assert ((slot.weight == 0).sum(1) == slot.weight.shape[1] // 2).all(), site
    assert set(site_reports(report)) == set(slots)
    assert zeros == report.pruned == sum(int((slot.weight == 0).sum()) for slot in slots.values())
    assert report.decoder_share == zeros / sum(p.numel() for p in blocks.parameters())
    assert report.model_share == zeros / sum(p.numel() for p in model.parameters())
    assert {s["name"].removesuffix(".weight").split(".")[-1] for s in report.skipped} == family.unpruned


@every_family
def test_magnitude_needs_no_data(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    dense = {name: slot.weight.clone() for name, slot in all_slots(model, family).items()}
    report = prune(model, PruneConfig(method="magnitude", device="cpu")).report
    slots = all_slots(model, family)
    for name, slot in slots.items():
        gone = slot.weight == 0
        assert int(gone.sum()) == slot.weight.numel() // 2, name
        assert dense[name][gone].abs().max() < dense[name][~gone].abs().min(), name
        assert torch.equal(dense[name][~gone], slot.weight[~gone]), name
    assert {site.tokens for site in site_reports(report).values()} == {None}


@every_family
def test_batches_and_order_of_the_windows_do_not_matter(name: str, windows: Tensor) -> None:
    family = FAMILIES[name]
    masks = []
    for size, tokens in ((4, windows), (1, windows), (2, windows), (4, windows.flip(0))):
        torch.manual_seed(0)
        model = family.build()
        prune(model, PruneConfig(device="cpu", batch_size=size), tokens=tokens)
        masks.append(torch.cat([(slot.weight != 0).flatten() for slot in all_slots(model, family).values()]))
    for other in masks[1:]:
        assert (other != masks[0]).double().mean() <= 1e-3


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_are_shorter_than_the_test_s(name: str, windows: Tensor) -> None:
    """Otherwise the tests above would not see a mask that belongs to another block."""
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    torch.manual_seed(0)
    wide = FAMILIES[name].build(sliding_window=64)
    with torch.no_grad():
        assert not torch.allclose(model(windows).logits, wide(windows).logits, atol=1e-2)


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_with_few_tokens_uses_what_its_siblings_saw(
    name: str, windows: Tensor, statistics: Statistics
) -> None:
    family = FAMILIES[name]
    pruned = family.build()
    dense = copy.deepcopy(pruned)
    few = windows[: 5 if name == "qwen3_next" else 3]  # so few that some have 32 tokens and some have not
    result = prune(pruned, WANDA, tokens=few)
    slots = check_against_brute_force(dense, pruned, family, few, statistics)
    experts = {site for site in slots if site.split(".")[-1].isdigit()}
    rare = {site for site in experts if slots[site].own_tokens < 32}
    assert rare and experts - rare
    assert {site for site, report in site_reports(result.report).items() if "pooled" in report.note} == rare
    assert any(f"{len(rare)} experts saw too few tokens" in warning for warning in result.report.warnings)


def test_an_expert_without_any_token_is_pruned_by_its_siblings_statistics(
    windows: Tensor, statistics: Statistics
) -> None:
    family = FAMILIES["gpt_oss"]
    pruned = family.build()
    with torch.no_grad():
        pruned.model.layers[1].mlp.router.bias[2] = -1e4
    dense = copy.deepcopy(pruned)
    prune(pruned, WANDA, tokens=windows)
    slots = check_against_brute_force(dense, pruned, family, windows, statistics)
    assert slots["model.layers.1.mlp.experts.gate_up_proj.2"].own_tokens == 0


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_experts_implementation_is_put_back(name: str, implementation: str, windows: Tensor) -> None:
    model = FAMILIES[name].build()
    model.set_experts_implementation(implementation)
    before = model.get_experts_implementation()
    prune(model, WANDA, tokens=windows)
    assert model.get_experts_implementation() == before == {"": implementation}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_a_failed_run_puts_everything_back(name: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name].build()
    model.train()
    before = restored_state(model)

    def broken(self: Wanda, site: Site) -> Tensor:
        raise ArithmeticError(site.name)

    monkeypatch.setattr(Wanda, "score", broken)
    with pytest.raises(ArithmeticError):
        prune(model, WANDA, tokens=windows)
    assert restored_state(model) == before


class Heads(nn.Module):
    """One map of the whole tensor, and one of the same memory in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(40, 40), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x.unflatten(-1, (2, 20))).flatten(-2)


def test_two_shapes_of_one_tensor_are_two_inputs(windows: Tensor, statistics: Statistics) -> None:
    pruned: Any = FAMILIES["llama"].build()
    pruned.model.layers[1].mlp = Heads()
    dense = copy.deepcopy(pruned)
    prune(pruned, WANDA, tokens=windows)
    slots = check_against_brute_force(dense, pruned, FAMILIES["llama"], windows, statistics)
    assert slots["model.layers.1.mlp.narrow"].tally.count == 2 * windows.numel()


class Mixer(nn.Module):
    """Mixes by a parameter of its own, which no rule can know to be a linear map."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kernel.mean()


@pytest.mark.parametrize("shape", [(5, 6), (40, 40), (3, 4, 5)])
@pytest.mark.parametrize("pattern", ["kernel", "model.layers.1.mlp.act_fn.kernel", "re:.*kernel$", "Mixer"])
def test_a_parameter_that_is_not_understood_is_named_and_can_be_ignored(
    shape: tuple[int, ...], pattern: str, windows: Tensor
) -> None:
    model: Any = FAMILIES["llama"].build()
    model.model.layers[1].mlp.act_fn = mixer = Mixer(*shape)
    before = mixer.kernel.detach().clone()
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.act_fn\.kernel .*--ignore"):
        prune(model, WANDA, tokens=windows)
    assert not (model.model.layers[0].self_attn.q_proj.weight == 0).any()
    result = prune(model, PruneConfig(device="cpu", ignore=(pattern,)), tokens=windows)
    assert torch.equal(mixer.kernel, before)
    expected = {"name": "model.layers.1.mlp.act_fn.kernel", "reason": "ignored as asked", "parameters": before.numel()}
    assert result.report.skipped == [expected]
    assert len(site_reports(result.report)) == 21


@pytest.mark.parametrize("model_type", ["hrm_text", "zaya"])
def test_blocks_that_are_no_plain_chain_are_refused(model_type: str, windows: Tensor) -> None:
    """HRM runs its blocks several times; Zaya's hand their router's state on."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 97, "head_dim": 8} | ({"num_hidden_layers": 2} if model_type == "zaya" else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    before = copy.deepcopy(tensors(model))
    with pytest.raises(InputError, match="such models are not supported"):
        prune(model, WANDA, tokens=windows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


@pytest.mark.parametrize("name", RELOADED)
def test_a_pruned_model_reloads(name: str, windows: Tensor, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    result = prune(model, WANDA, tokens=windows)
    folder = result.save(tmp_path / "pruned")  # raises unless a fresh process loads the same model
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    for key, tensor in tensors(reloaded).items():
        assert torch.equal(tensor, tensors(model)[key]), key
    with torch.no_grad():
        torch.testing.assert_close(reloaded(windows).logits, model(windows).logits)
