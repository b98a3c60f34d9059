"""STADE and STADE-W against their formulas, and the identities that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import (
    CASES,
    LAYOUTS,
    count,
    f64,
    inputs,
    keep_nm,
    keep_rows,
    literal_keep,
    make_pattern,
    make_site,
    mse,
    stade,
    stade_bias,
    wanda,
    weights,
)
from torch import nn
from torch.testing import assert_close

from llmprune.collect import Collector
from llmprune.criteria import criterion
from llmprune.errors import InputError
from llmprune.learning import learn
from llmprune.patterns import NM, Unstructured
from llmprune.sites import Site

FED_BY_A_NORM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "qkv_proj", "query_key_value", "c_attn",
                 "gate_up_proj", "c_fc", "dense_h_to_4h")  # fmt: skip
NOT_FED = ("o_proj", "out_proj", "down_proj", "fc2", "dense", "c_proj", "dense_4h_to_h")


@pytest.mark.parametrize(("text", "sparsity", "width"), CASES)
def test_stade(text: str, sparsity: str, width: int) -> None:
    W, x = weights(20, width), inputs(200, width, mean=2.0)
    site, scores = make_site(W, x, bias=torch.randn(20)), stade(f64(W), f64(x))
    assert_close(criterion("stade").score(site).double(), torch.from_numpy(scores), rtol=1e-5, atol=0)
    pruned = criterion("stade").prune(site, make_pattern(text, sparsity))
    keep = literal_keep(scores, text, sparsity, "row")
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert torch.equal(pruned.weight, W * pruned.keep)  # survivors do not move
    assert pruned.bias_shift is not None
    assert_close(pruned.bias_shift.double(), torch.from_numpy(stade_bias(f64(W), f64(x), keep)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bias_is_moved_by_what_the_dense_weights_say(layout: str, dtype: torch.dtype) -> None:
    W, x, bias = weights(20, 68).to(dtype), inputs(200, 68, mean=2.0), torch.randn(20).to(dtype)
    site = make_site(W, x, bias=bias, layout=layout)
    pruned = criterion("stade").prune(site, Unstructured(0.5))
    expected = stade_bias(f64(W), f64(x), pruned.keep.numpy())
    assert np.abs(expected).min() > 1e-3  # after zeroing first, the shift would be 0 everywhere
    site.write_(pruned.weight, pruned.keep, pruned.bias_shift)
    assert site.bias is not None and site.bias.dtype == dtype
    half_a_step = torch.finfo(dtype).eps * 8 + 1e-5
    assert np.abs(f64(site.bias) - (f64(bias) + expected)).max() < half_a_step


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_centred_features_give_wandas_mask_and_no_shift(pattern: Unstructured | NM) -> None:
    W, x = weights(20, 68), inputs(300, 68)
    x = (x.double() - x.double().mean(0)).float()
    site = make_site(W, x, bias=torch.zeros(20))
    pruned = criterion("stade").prune(site, pattern)
    assert torch.equal(pruned.keep, criterion("wanda").prune(site, pattern).keep)
    assert pruned.bias_shift is not None and float(pruned.bias_shift.abs().max()) < 1e-5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_strong_means_order_the_errors(seed: int, text: str) -> None:
    W, x = weights(32, 68, seed), inputs(600, 68, seed, mean=3.0, correlated=False)
    pattern = NM(2, 4) if ":" in text else Unstructured(float(text))
    site = make_site(W, x, bias=torch.zeros(32))
    X, dense = f64(x), f64(W)
    ours, theirs = criterion("stade").prune(site, pattern), criterion("wanda").prune(site, pattern)
    assert ours.bias_shift is not None
    repaired = mse(f64(ours.weight) - dense, X, f64(ours.bias_shift))
    wanda_repaired = mse(f64(theirs.weight) - dense, X, stade_bias(dense, X, theirs.keep.numpy()))
    assert repaired < wanda_repaired < mse(f64(theirs.weight) - dense, X)


@pytest.mark.parametrize("mean", [0.0, 0.5, 4.0])
def test_the_bias_saves_exactly_the_squared_mean_of_what_is_dropped(mean: float) -> None:
    W, x = weights(20, 132), inputs(300, 132, mean=mean)
    pruned = criterion("stade").prune(make_site(W, x, bias=torch.zeros(20)), Unstructured(0.57))
    X, dense, change = f64(x), f64(W), f64(pruned.weight) - f64(W)
    assert pruned.bias_shift is not None
    saved = mse(change, X) - mse(change, X, f64(pruned.bias_shift))
    dropped = dense * ~pruned.keep.numpy()
    mu = X.mean(0)
    assert saved == pytest.approx(np.mean([(row @ mu) ** 2 for row in dropped]), rel=1e-4, abs=1e-6)


def test_one_pruned_weight_costs_its_square_times_the_variance() -> None:
    W, x = weights(20, 68), inputs(150, 68, mean=3.0)
    pruned = criterion("stade").prune(make_site(W, x, bias=torch.zeros(20)), NM(67, 68))
    X, dense = f64(x), f64(W)
    assert pruned.bias_shift is not None and (~pruned.keep).sum(1).tolist() == [1] * 20
    for i in range(20):
        j = int((~pruned.keep[i]).nonzero())
        error = X @ (f64(pruned.weight[i]) - dense[i]) + float(pruned.bias_shift[i])
        assert np.mean(error**2) == pytest.approx(dense[i, j] ** 2 * np.var(X[:, j], ddof=1) * 149 / 150, rel=1e-4)


def test_without_a_bias_to_move_it_is_wanda_and_says_so() -> None:
    W, x = weights(20, 68), inputs(200, 68, mean=4.0)
    site = make_site(W, x)
    pruned, theirs = criterion("stade").prune(site, NM(2, 4)), criterion("wanda").prune(site, NM(2, 4))
    assert torch.equal(pruned.keep, theirs.keep) and torch.equal(pruned.weight, theirs.weight)
    assert pruned.bias_shift is None and pruned.note == "no bias to move" and theirs.note == ""
    scores = criterion("stade").score(make_site(W, x, bias=torch.zeros(20)))
    assert not torch.equal(NM(2, 4).keep(scores), pruned.keep)  # the two rules do differ on this input


def test_a_constant_feature_is_pruned_first_and_moved_into_the_bias_exactly() -> None:
    W, x = weights(20, 8), inputs(100, 8)
    x[:, 3] = 5.0
    pruned = criterion("stade").prune(make_site(W, x, bias=torch.zeros(20)), NM(7, 8))
    assert (~pruned.keep).nonzero()[:, 1].unique().tolist() == [3]
    assert_close(pruned.bias_shift, 5.0 * W[:, 3])
    assert mse(f64(pruned.weight) - f64(W), f64(x), f64(5.0 * W[:, 3])) < 1e-10


@pytest.mark.parametrize("role", [*FED_BY_A_NORM, *NOT_FED])
def test_stade_w_switches_by_role(role: str) -> None:
    W, x = weights(20, 68), inputs(200, 68, mean=4.0)
    X = f64(x)
    for observed in (None, True, False):  # what was observed has no say where the role is known
        site = make_site(W, x, bias=torch.zeros(20), name=f"model.layers.3.part.{role}")
        site.fed_by_norm = observed
        pruned = criterion("stade-w").prune(site, Unstructured(0.5))
        if role in FED_BY_A_NORM:
            assert np.array_equal(pruned.keep.numpy(), keep_rows(wanda(f64(W), X), count(68, "0.5")))
            assert pruned.bias_shift is None and pruned.note == ""
        else:
            assert np.array_equal(pruned.keep.numpy(), keep_rows(stade(f64(W), X), count(68, "0.5")))
            assert pruned.bias_shift is not None and float(pruned.bias_shift.abs().min()) > 0


def test_stade_w_follows_an_experts_role() -> None:
    W, x = weights(20, 68), inputs(200, 68, mean=4.0)
    site = make_site(W, x, bias=torch.zeros(20), layout="expert")  # ....down_proj.1
    assert criterion("stade-w").prune(site, NM(2, 4)).bias_shift is not None
    site.name = "model.layers.0.mlp.experts.gate_up_proj.1"
    assert criterion("stade-w").prune(site, NM(2, 4)).bias_shift is None


@pytest.mark.parametrize("fed", [True, False])
def test_stade_w_goes_by_what_was_observed_for_an_unknown_role(fed: bool) -> None:
    W, x = weights(20, 68), inputs(200, 68, mean=4.0)
    site = make_site(W, x, bias=torch.zeros(20), name="model.layers.0.mixer.in_proj")
    site.fed_by_norm = fed
    pruned = criterion("stade-w").prune(site, NM(2, 4))
    scores = (wanda if fed else stade)(f64(W), f64(x))
    assert np.array_equal(pruned.keep.numpy(), keep_nm(scores, 2, 4))
    assert (pruned.bias_shift is None) is fed


def test_stade_w_refuses_what_it_cannot_decide() -> None:
    site = make_site(weights(4, 8), inputs(50, 8), bias=torch.zeros(4), name="model.layers.0.mixer.in_proj")
    with pytest.raises(InputError, match=r"layers\.0\.mixer\.in_proj"):
        criterion("stade-w").prune(site, NM(2, 4))


class OddBlock(nn.Module):
    """A block whose linear layers have names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.back = nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.back(torch.relu(self.into(self.norm(x))))
        return out


def test_what_feeds_a_site_is_observed_in_a_block_of_unknown_names() -> None:
    block = OddBlock()
    sites = [Site(f"layers.0.{name}", getattr(block, name), "weight") for name in ("into", "back")]
    x = torch.randn(2, 9, 12)
    wiring, seen = learn(block, sites, lambda: block(x))
    collector = Collector(wiring.groups, {"moments"}, torch.device("cpu"))
    for group, (_, arrived) in zip(wiring.groups, seen.arrivals, strict=True):
        collector.add(group, arrived)
    collector.hand_out(wiring.groups)
    into, back = sites
    assert [group.joins_stream for group in wiring.groups] == [False, True]
    assert criterion("stade-w").prune(into, NM(2, 4)).bias_shift is None
    assert criterion("stade-w").prune(back, NM(2, 4)).bias_shift is not None
