"""How many units stay: the share that is asked for, what the config can say, and what the user leaves alone."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from cutting import assert_same, bits, block_sizes, cut
from families import FAMILIES
from tiny import make_llama
from torch import Tensor

from llmprune import InputError, PruneConfig, PruneResult, prune

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, FFN = "self_attn.o_proj", "mlp.down_proj"


def kept(result: PruneResult) -> dict[str, int]:
    """Units by output projection."""
    assert result.report.widths is not None
    found: dict[str, int] = result.report.widths["kept"]
    return found


def best_widths(sparsity: str) -> tuple[int, int]:
    """Groups and channels that a Llama with four groups of one head keeps.

    Its config takes 1, 2 or 4 heads: others do not divide its 32 features.
    """
    group, channel, norms = 32 * (8 + 8 + 8 + 8), 3 * 32, 2 * 32
    goal = (1 - Fraction(sparsity)) * (4 * group + 68 * channel + norms)
    share = (goal - norms) / (4 * group + 68 * channel)
    for groups in sorted((4, 2, 1), key=lambda g: abs(g - 4 * share)):
        channels = (goal - norms - groups * group) // channel
        if 1 <= channels <= 68:
            return groups, int(channels)
    raise AssertionError


@pytest.mark.parametrize("sparsity", ["0.01", "0.1", "0.2", "0.29", "0.37", "0.5", "0.6", "0.75", "0.85"])
def test_the_share_that_goes_is_met_within_one_unit(sparsity: str) -> None:
    result = cut(make_llama(num_key_value_heads=4), float(sparsity))
    groups, channels = best_widths(sparsity)
    assert kept(result) == {HEADS: groups, FFN: channels}
    config = result.model.config
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (groups, groups, 8)
    dense = 32 * 32 * 4 + 96 * 68 + 64
    gone = 1 - sum(block_sizes(result.model)) / (3 * dense)
    assert gone == pytest.approx(result.report.sparsity)
    assert float(sparsity) - 1e-9 <= gone < float(sparsity) + 96 / dense


@pytest.mark.parametrize("method", ["wanda", "stade"])
@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_biases_that_a_method_adds_are_paid_for(method: str, sparsity: float, windows: Tensor) -> None:
    model = make_llama()
    dense = sum(block_sizes(model))
    result = prune(model, PruneConfig(method=method, pattern="uniform", sparsity=sparsity, device="cpu"),
                   tokens=windows)  # fmt: skip
    gone = 1 - sum(block_sizes(result.model)) / dense
    assert sparsity <= gone < sparsity + 3 * 98 / dense
    assert bool(result.report.bias_flags) == (method == "stade")


@pytest.mark.parametrize("options", [{"ignore": ("k_proj",)}, {"keep_heads": True}])
def test_what_is_left_alone_is_given_no_bias(options: dict[str, Any], windows: Tensor) -> None:
    model = make_llama()
    dense = sum(block_sizes(model))
    config = PruneConfig(method="stade", pattern="uniform", sparsity=0.25, device="cpu", **options)
    result = prune(model, config, tokens=windows)
    assert result.report.bias_flags == ["mlp_bias"]
    assert 0.25 <= 1 - sum(block_sizes(result.model)) / dense < 0.25 + 3 * 98 / dense


@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_heads_stay_if_they_are_to(sparsity: float) -> None:
    model = make_llama()
    dense = sum(block_sizes(model))
    result = cut(model, sparsity, keep_heads=True)
    assert kept(result).keys() == {FFN}
    assert result.model.config.num_key_value_heads == 2
    assert sparsity <= 1 - sum(block_sizes(result.model)) / dense < sparsity + 3 * 96 / dense


def test_heads_stay_in_a_model_where_nothing_else_can_go() -> None:
    model = FAMILIES["mixtral"].build()
    before = bits(model)
    with pytest.raises(InputError):
        cut(model, 0.1, keep_heads=True)
    assert_same(model, before)


@pytest.mark.parametrize("multiple", [4, 8, 17])
@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_channels_become_a_multiple(multiple: int, sparsity: float) -> None:
    model = make_llama()
    dense = sum(block_sizes(model))
    free, result = cut(make_llama(), sparsity), cut(model, sparsity, round_channels=multiple)
    assert result.model.config.intermediate_size % multiple == 0
    assert kept(result)[HEADS] == kept(free)[HEADS]
    assert 0 <= kept(free)[FFN] - kept(result)[FFN] < multiple
    assert 1 - sum(block_sizes(result.model)) / dense >= sparsity


def test_rounding_channels_leaves_heads_alone() -> None:
    result = cut(make_llama(num_key_value_heads=4), 0.28, ignore=["down_proj"], round_channels=4)
    assert kept(result) == {HEADS: 1}


@pytest.mark.parametrize(("changes", "sparsity", "options"), [
    ({}, 0.9, {}),
    ({}, 0.2, {"round_channels": 100}),
    ({"intermediate_size": 12, "num_hidden_layers": 2}, 0.3, {}),  # more than all channels, less than a group
])  # fmt: skip
def test_a_refusal_is_true(changes: dict[str, int], sparsity: float, options: dict[str, int]) -> None:
    """If it says that more always stays than is to stay, then it does."""
    try:
        result = cut(make_llama(**changes), sparsity, **options)
    except InputError as error:
        said = re.search(r"([\d,]+) are to stay, but ([\d,]+) always do", str(error))
        if said:
            goal, least = (int(number.replace(",", "")) for number in said.groups())
            assert least > goal
    else:
        assert result.report.sparsity >= sparsity


@pytest.mark.parametrize(("ignored", "site", "stays"), [("down_proj", FFN, HEADS), ("o_proj", HEADS, FFN)])
def test_an_ignored_projection_keeps_its_units(ignored: str, site: str, stays: str) -> None:
    result = cut(make_llama(), 0.1, ignore=[ignored])
    assert kept(result).keys() == {stays}
    assert result.report.widths is not None
    assert result.report.widths["fixed"] == {site: "left out as asked"}
    module = result.model.model.layers[1].get_submodule(site)
    assert module.weight.shape == make_llama().model.layers[1].get_submodule(site).weight.shape


def test_an_ignored_input_projection_is_not_cut() -> None:
    model = make_llama()
    before = bits(model)
    try:
        smaller = cut(model, 0.1, ignore=["gate_proj"]).model
    except InputError:
        assert_same(model, before)
    else:
        assert smaller.model.layers[0].mlp.gate_proj.weight.shape == (68, 32)


def test_a_projection_ignored_in_one_block_only_is_refused() -> None:
    model = make_llama()
    before = bits(model)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.down_proj is left out .* every block$"):
        cut(model, 0.1, ignore=["model.layers.1.mlp.down_proj"])
    assert_same(model, before)


def test_counts_that_the_config_cannot_say_are_never_chosen() -> None:
    """Three heads do not divide 32 features: two are the next to ask for more than is wanted, or there is no way."""
    model = make_llama(num_key_value_heads=4)
    before = bits(model)
    try:
        result = cut(model, 0.05, ignore=["down_proj"])
    except InputError:
        assert_same(model, before)
    else:
        assert kept(result) == {HEADS: 2}


@pytest.mark.parametrize("options", [{}, {"keep_heads": True}, {"ignore": ["down_proj"]}, {"ignore": ["o_proj"]}])
def test_a_sparsity_that_cannot_be_met_changes_nothing(options: dict[str, object]) -> None:
    model = make_llama()
    before = bits(model)
    with pytest.raises(InputError, match="ask for a smaller sparsity") as error:
        cut(model, 0.99, **options)
    assert "\n" not in str(error.value)
    assert_same(model, before)


def test_everything_ignored_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be cut"):
        cut(make_llama(), 0.1, targets=["q_proj"])


@pytest.mark.parametrize("target", ["down_proj", "o_proj", "gate_proj"])
def test_what_would_be_cut_with_a_target_must_be_one_too(target: str) -> None:
    with pytest.raises(InputError, match=r"cannot be cut to smaller widths .*left out as asked"):
        cut(make_llama(), 0.1, targets=[target])


def test_targets_that_make_up_whole_units_are_cut() -> None:
    result = cut(make_llama(), 0.1, targets=["mlp"])
    assert [kind["units"] for kind in result.report.widths["kinds"]] == ["channels"]
    assert not [s for s in result.report.skipped if "mlp" in s["name"] and s["reason"] == "not among the targets"]


def test_a_rounding_that_leaves_no_width_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"no multiple of round_channels 1000 is below the 68 channels of mlp\.down_proj"
    ):
        cut(make_llama(), 0.1, round_channels=1000)
