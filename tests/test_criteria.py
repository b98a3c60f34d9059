"""Magnitude, random, Wanda and RIA against their formulas, and what holds for every method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import CASES, LAYOUTS, count, f64, inputs, literal_keep, make_pattern, make_site, ria, wanda, weights
from tiny import WEIGHT_METHODS
from torch import Tensor
from torch.testing import assert_close

from llmprune.criteria import Pruned, criterion, methods
from llmprune.errors import InputError
from llmprune.inputs import InputStatistics
from llmprune.patterns import NM


def assert_masked(pruned: Pruned, dense: Tensor, expected: np.ndarray) -> None:
    """The mask is the expected one and survivors keep their value to the bit."""
    assert np.array_equal(pruned.keep.numpy(), expected)
    assert pruned.weight.dtype == torch.float32
    assert torch.equal(pruned.weight[pruned.keep], dense.float()[pruned.keep])
    assert not pruned.weight[~pruned.keep].any()
    assert pruned.bias_shift is None and pruned.note == ""


@pytest.mark.parametrize(("text", "sparsity", "width"), CASES)
def test_magnitude(text: str, sparsity: str, width: int) -> None:
    W = weights(20, width)
    pruned = criterion("magnitude").prune(make_site(W), make_pattern(text, sparsity))
    assert_masked(pruned, W, literal_keep(np.abs(f64(W)), text, sparsity, "matrix"))


@pytest.mark.parametrize(("text", "sparsity", "width"), CASES)
def test_wanda(text: str, sparsity: str, width: int) -> None:
    W, x = weights(20, width), inputs(200, width)
    site, scores = make_site(W, x), wanda(f64(W), f64(x))
    assert_close(criterion("wanda").score(site).double(), torch.from_numpy(scores), rtol=1e-5, atol=0)
    pruned = criterion("wanda").prune(site, make_pattern(text, sparsity))
    assert_masked(pruned, W, literal_keep(scores, text, sparsity, "row"))


@pytest.mark.parametrize(("text", "sparsity", "width"), CASES)
def test_ria(text: str, sparsity: str, width: int) -> None:
    W, x = weights(20, width), inputs(200, width)
    W[3], W[:, [0, 7]] = 0.0, 0.0  # an output that was switched off, and two inputs that nobody reads
    site, scores = make_site(W, x), ria(f64(W), f64(x))
    assert_close(criterion("ria").score(site).double(), torch.from_numpy(scores), rtol=1e-5, atol=0)
    pruned = criterion("ria").prune(site, make_pattern(text, sparsity))
    assert_masked(pruned, W, literal_keep(scores, text, sparsity, "matrix"))


def test_ria_of_a_zero_matrix_is_zero() -> None:
    site = make_site(torch.zeros(4, 8), inputs(50, 8))
    assert not criterion("ria").score(site).any()


def test_wanda_ignores_the_order_and_the_batches_of_tokens() -> None:
    W, x = weights(20, 68), inputs(230, 68)
    keep = criterion("wanda").prune(make_site(W, x), make_pattern("row", "0.5")).keep
    for order in (torch.randperm(230), torch.arange(230).flip(0)):
        assert torch.equal(criterion("wanda").prune(make_site(W, x[order]), make_pattern("row", "0.5")).keep, keep)
    site = make_site(W)
    site.statistics = InputStatistics(68, {"moments"})
    for part in x.split(7):
        site.statistics.update(part)
    assert torch.equal(criterion("wanda").prune(site, make_pattern("row", "0.5")).keep, keep)


@pytest.mark.parametrize("text", ["row", "2:4"])
def test_wanda_ignores_a_scale_that_moves_between_input_and_column(text: str) -> None:
    W, x = weights(20, 68), inputs(230, 68)
    scale = torch.exp(torch.randn(68))
    pattern = make_pattern(text, "")
    plain = criterion("wanda").prune(make_site(W, x), pattern)
    scaled = criterion("wanda").prune(make_site(W / scale, x * scale), pattern)
    assert torch.equal(plain.keep, scaled.keep)


def test_wanda_works_from_a_gram_as_from_moments() -> None:
    W, x = weights(20, 68), inputs(230, 68)
    site = make_site(W)
    site.statistics = InputStatistics(68, {"gram"})
    site.statistics.update(x)
    assert_close(criterion("wanda").score(site), criterion("wanda").score(make_site(W, x)), rtol=1e-5, atol=0)


def test_small_half_precision_weights_are_scored_in_float32() -> None:
    W = torch.tensor([[1e-6, 2e-6, 3e-6, 4e-6]], dtype=torch.float16)  # their squares are 0 in float16
    x = inputs(50, 4)
    for name in ("wanda", "stade"):
        site = make_site(W, x, bias=torch.zeros(1, dtype=torch.float16))
        assert criterion(name).score(site).dtype == torch.float32
        assert bool((criterion(name).score(site) > 0).all())


def test_random_depends_on_seed_and_name_only() -> None:
    def score(
        seed: int = 0,
        name: str = "a.0.q_proj",
        dtype: torch.dtype = torch.float32,
        layout: str = "linear",
        weights_seed: int = 0,
    ) -> Tensor:
        torch.rand(3)  # whatever was drawn before must not matter
        W = weights(20, 68, weights_seed).to(dtype)
        return criterion("random", seed).score(make_site(W, name=name, layout=layout))

    first = score()
    assert not torch.equal(first, score(seed=1))
    assert not torch.equal(first, score(name="a.1.q_proj"))
    for same in (score(), score(dtype=torch.bfloat16), score(layout="conv1d"), score(weights_seed=9)):
        assert torch.equal(first, same)
    assert torch.equal(score(layout="expert"), score(layout="expert_transposed"))
    method = criterion("random")
    a, b = make_site(weights(20, 68), name="a"), make_site(weights(20, 68), name="b")
    forward = [method.score(a), method.score(b)]
    assert torch.equal(method.score(b), forward[1]) and torch.equal(method.score(a), forward[0])


def test_random_leaves_the_global_generator_alone_and_is_uniform() -> None:
    site = make_site(weights(100, 100))
    state = torch.get_rng_state()
    scores = criterion("random").score(site)
    assert torch.equal(state, torch.get_rng_state())
    assert float(scores.min()) >= 0 and float(scores.max()) < 1
    for quarter in (0.25, 0.5, 0.75):
        assert float((scores < quarter).float().mean()) == pytest.approx(quarter, abs=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_pruning_decides_on_the_dense_weights_and_does_not_write(name: str, layout: str) -> None:
    W, x, bias = weights(20, 68), inputs(200, 68), torch.randn(20)
    plain = criterion(name).prune(make_site(W, x, bias=bias), NM(2, 4))
    site = make_site(W, x, bias=bias, layout=layout)
    if name == "random":  # its scores go by the name, which an expert's number is part of
        site.name = "block.down_proj"
    before = site.stored.detach().clone()
    pruned = criterion(name).prune(site, NM(2, 4))
    assert torch.equal(site.stored, before)
    assert site.bias is not None and torch.equal(site.bias, bias)
    assert torch.equal(pruned.keep, plain.keep)
    assert_close(pruned.weight, plain.weight)


@pytest.mark.parametrize(("text", "sparsity", "width"), CASES)
@pytest.mark.parametrize("name", sorted(set(WEIGHT_METHODS) - {"sparsegpt"}))
def test_counts_are_exact_also_where_nothing_tells_the_weights_apart(
    name: str, text: str, sparsity: str, width: int
) -> None:
    site = make_site(torch.ones(6, width), torch.ones(5, width), bias=torch.zeros(6))
    method = criterion(name)
    keep = method.prune(site, make_pattern(text, sparsity)).keep
    if ":" in text:
        n, m = map(int, text.split(":"))
        assert keep.view(6, -1, m).sum(-1).unique().tolist() == [n]
    elif (method.group if text == "unstructured" else text) == "row":
        assert (~keep).sum(1).unique().tolist() == [count(width, sparsity)]
    else:
        assert int((~keep).sum()) == count(6 * width, sparsity)


def test_unknown_methods_are_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean wanda"):
        criterion("wandaa")
    assert list(methods()) == sorted(methods())
    assert {"magnitude", "random", "wanda", "stade", "stade-w", "sparsegpt", "ria"} <= set(methods())
