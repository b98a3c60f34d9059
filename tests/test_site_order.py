"""Site order: every site is measured behind the pruned sites before it, at the price of one pass."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from brute_force import Statistics, all_slots, check_against_brute_force, keep_by_size
from families import FAMILIES, MIXTURES, restored_state
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune import InputError, PruneConfig, prune
from llmprune.blocks import survey
from llmprune.criteria.wanda import Wanda
from llmprune.sites import Site
from llmprune.walk import walk

WANDA = PruneConfig(method="wanda", sequential="site", device="cpu", batch_size=4)
SIDES = [("site", "own"), ("site", "dense"), ("block", "dense")]

pytestmark = pytest.mark.usefixtures("one_thread")


def masks(model: PreTrainedModel, name: str) -> Tensor:
    return torch.cat([(slot.weight != 0).flatten() for slot in all_slots(model, FAMILIES[name]).values()])


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_masks_and_logits_match_brute_force(name: str, windows: Tensor, statistics: Statistics) -> None:
    family = FAMILIES[name]
    pruned = family.build()
    dense, by_block = copy.deepcopy(pruned), copy.deepcopy(pruned)
    kept_by_size = {name: keep_by_size(slot.weight) for name, slot in all_slots(dense, family).items()}
    report = prune(pruned, WANDA, tokens=windows).report
    slots = check_against_brute_force(dense, pruned, family, windows, statistics, "site")
    tokens = {site.name: site.tokens for block in report.blocks for site in block.sites}
    assert tokens == {name: slot.tally.count for name, slot in slots.items()}
    moved = sum(int((slot.keep != kept_by_size[name]).sum()) for name, slot in slots.items())
    assert moved > 0.02 * sum(slot.keep.numel() for slot in slots.values())
    # The test would say little if block order came to the same.
    prune(by_block, PruneConfig(method="wanda", device="cpu", batch_size=4), tokens=windows)
    assert (masks(by_block, name) != masks(pruned, name)).double().mean() > 0.01


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_with_few_tokens_are_pooled_within_their_parameter(
    name: str, windows: Tensor, statistics: Statistics
) -> None:
    family = FAMILIES[name]
    pruned = family.build()
    dense = copy.deepcopy(pruned)
    few = windows[: {"qwen3_next": 5, "deepseek_v3": 4}.get(name, 3)]  # some have 32 tokens and some have not
    report = prune(pruned, WANDA, tokens=few).report
    slots = check_against_brute_force(dense, pruned, family, few, statistics, "site")
    experts = {site for site in slots if site.split(".")[-1].isdigit()}
    rare = {site for site in experts if slots[site].own_tokens < 32}
    assert rare and experts - rare
    assert {site.name for block in report.blocks for site in block.sites if "pooled" in site.note} == rare


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma4", "gpt_oss", "qwen3_next"])
def test_batches_and_order_of_the_windows_do_not_matter(name: str, windows: Tensor) -> None:
    found = []
    for size, tokens in ((4, windows), (1, windows), (2, windows), (4, windows.flip(0))):
        torch.manual_seed(0)
        model = FAMILIES[name].build()
        prune(model, PruneConfig(sequential="site", device="cpu", batch_size=size), tokens=tokens)
        found.append(masks(model, name))
    for other in found[1:]:
        assert (other != found[0]).double().mean() <= 1e-3


@pytest.mark.parametrize("method", ["wanda", "regress"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_a_failed_run_puts_everything_back(
    name: str, method: str, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES[name].build()
    model.train()
    blocks = model.get_submodule(FAMILIES[name].blocks)
    assert isinstance(blocks, nn.ModuleList)
    blocks[1].forward = blocks[1].forward  # as accelerate leaves one behind
    before = restored_state(model)
    pruned: list[str] = []

    def broken(site: Site, *rest: object) -> None:
        if site.name.startswith(f"{FAMILIES[name].blocks}.1.") and len(pruned) > 2:
            raise ArithmeticError(site.name)
        pruned.append(site.name)

    monkeypatch.setattr(Site, "write_", broken)
    with pytest.raises(ArithmeticError):
        prune(model, PruneConfig(method=method, sequential="site", device="cpu", batch_size=4), tokens=windows)
    assert restored_state(model) == before


@pytest.mark.parametrize("needs", [{"moments"}, {"covariance", "cross"}])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_walk_that_is_left_puts_everything_back(needs: set[str], stop: int, windows: Tensor) -> None:
    model = FAMILIES["gpt_oss"].build()
    model.train()
    before = restored_state(model)
    steps = walk(model, survey(model), windows, needs=needs, sequential="site", batch_size=4)
    visits = [next(steps) for _ in range(stop)]
    assert visits[-1].index == (stop > 4)
    assert restored_state(model) != before
    steps.close()  # type: ignore[attr-defined]
    assert restored_state(model) == before


def counted(model: Any, windows: Tensor, **options: Any) -> dict[str, Counter[int]]:
    """How often each block was begun, and how often it was run to its end, while it was pruned in site order."""
    counts: dict[str, Counter[int]] = {"begun": Counter(), "ended": Counter()}
    for number, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, number=number: counts["begun"].update([number]))
        block.register_forward_hook(lambda *_, number=number: counts["ended"].update([number]))
    steps = walk(model, survey(model), windows, sequential="site", batch_size=4, **options)
    next(steps)  # the capture is not of interest, nor what the first block has done by now
    captured = copy.deepcopy(counts)
    for visit in steps:
        assert visit.index < 3
    assert captured["begun"].keys() == {0}
    for number in (1, 2):
        counts["ended"][number] -= captured["ended"][number]
    return counts


@pytest.mark.parametrize("dense", [False, True])
def test_a_block_runs_once_for_every_micro_batch_and_once_more(dense: bool, windows: Tensor) -> None:
    needs = {"covariance", "cross"} if dense else {"moments"}
    counts = counted(FAMILIES["llama"].build(), windows, needs=needs)
    own = 3 if dense else 0  # micro-batches of the dense model
    assert counts["begun"][1] == counts["ended"][1] == 3 + 1 + own
    assert counts["begun"][2] == 3 + 1 + own
    assert counts["ended"][2] == 1 + 1 + own  # of the last one only the error on the first micro-batch is wanted


class Twice(nn.Module):
    """Its second map is used twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.down(self.up(x))))
        return y


@pytest.mark.parametrize(("sequential", "target"), SIDES)
def test_a_site_that_is_called_twice_is_refused(sequential: str, target: str, windows: Tensor) -> None:
    model: Any = FAMILIES["llama"].build()
    model.model.layers[1].mlp = Twice()
    before = restored_state(model)
    config = PruneConfig(method="wanda", sequential=sequential, target=target, device="cpu", batch_size=4)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down is called more than once .*--sequential block"):
        prune(model, config, tokens=windows)
    assert restored_state(model) == before


def test_a_site_that_is_called_twice_is_measured_on_both_calls_in_block_order(
    windows: Tensor, statistics: Statistics
) -> None:
    pruned: Any = FAMILIES["llama"].build()
    pruned.model.layers[1].mlp = Twice()
    dense = copy.deepcopy(pruned)
    prune(pruned, PruneConfig(method="wanda", device="cpu", batch_size=4), tokens=windows)
    slots = check_against_brute_force(dense, pruned, FAMILIES["llama"], windows, statistics)
    assert slots["model.layers.1.mlp.down"].tally.count == 2 * windows.numel()


def test_sites_come_as_they_are_called_and_leave_nothing_behind(windows: Tensor, monkeypatch: Any) -> None:
    model = FAMILIES["mixtral"].build()
    seen: list[str] = []
    score = Wanda.score

    def spy(self: Wanda, site: Site) -> Tensor:
        seen.append(site.name.removeprefix("model.layers.0."))
        return score(self, site)

    monkeypatch.setattr(Wanda, "score", spy)
    prune(model, WANDA, tokens=windows)
    experts = [f"mlp.experts.{key}.{number}" for key in ("gate_up_proj", "down_proj") for number in range(4)]
    assert seen[:12] == [f"self_attn.{key}_proj" for key in "qkvo"] + experts
