"""What is left in the model after a site was written: exact zeros, none of them negative, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from literal import LAYOUTS, inputs, make_site, weights
from llmprune_kernels import obeys
from tiny import WEIGHT_METHODS
from torch import Tensor

from llmprune.criteria import criterion
from llmprune.patterns import NM, Unstructured

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def negative_zeros(weight: Tensor) -> int:
    return sum(str(value) == "-0.0" for row in weight.tolist() for value in row)


def zeros(weight: Tensor) -> int:
    return sum(value == 0 for row in weight.tolist() for value in row)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_every_method_leaves_exact_counts(name: str, dtype: torch.dtype, layout: str) -> None:
    W, x = weights(12, 68).to(dtype), inputs(272, 68)
    for pattern in (Unstructured(0.5), NM(2, 4)):
        site = make_site(W, x, bias=torch.zeros(12, dtype=dtype), layout=layout)
        pruned = criterion(name).prune(site, pattern)
        site.write_(pruned.weight, pruned.keep, pruned.bias_shift)
        assert site.weight.dtype == dtype and site.weight.shape == (12, 68)
        assert zeros(site.weight) == 12 * 34
        assert negative_zeros(site.weight) == 0
        assert bool((site.weight[~pruned.keep] == 0).all())
        assert torch.equal(site.weight[pruned.keep], pruned.weight[pruned.keep].to(dtype))
        if isinstance(pattern, NM):
            assert obeys(site.weight, 2, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_negative_zero_survives(dtype: torch.dtype, layout: str) -> None:
    W = weights(6, 68)
    W[0, :9] = -0.0  # was one before
    W[1, :9] = -1e-45  # is one in half precision, or in every dtype where small numbers are flushed
    W[2, :9] = -3.0  # becomes one where it is multiplied by its mask
    keep = torch.ones(6, 68, dtype=torch.bool)
    keep[2, :9] = keep[0, :4] = False
    site = make_site(weights(6, 68, seed=1).to(dtype), layout=layout)
    site.write_(W, keep)
    assert negative_zeros(site.weight) == 0
    assert not site.weight[0, :9].any() and not site.weight[2, :9].any()
    rest = keep.clone()
    rest[:2, :9] = False
    assert torch.equal(site.weight[rest], W.to(dtype)[rest])


def test_what_underflows_is_zero_and_no_more() -> None:
    W = torch.full((1, 8), -1e-9)  # smaller than any float16
    site = make_site(torch.ones(1, 8, dtype=torch.float16))
    site.write_(W, torch.ones(1, 8, dtype=torch.bool))
    assert zeros(site.weight) == 8 and negative_zeros(site.weight) == 0


@pytest.mark.parametrize("layout", ["expert", "expert_transposed"])
def test_a_neighbouring_expert_is_not_touched(layout: str) -> None:
    W, bias = weights(6, 68), torch.randn(6)
    site = make_site(W, layout=layout, bias=bias)
    site.write_(W, torch.rand(6, 68) < 0.5, torch.ones(6))
    assert bool((site.stored[0] == 7.0).all()) and bool((site.module.down_proj_bias[0] == 7.0).all())
    assert torch.equal(site.module.down_proj_bias[1], bias + 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_moves_in_float32_and_is_rounded_once(dtype: torch.dtype, layout: str) -> None:
    W, bias, shift = weights(64, 8).to(dtype), torch.randn(64).to(dtype), torch.randn(64)
    site = make_site(W, layout=layout, bias=bias)
    site.write_(W.float(), torch.ones(64, 8, dtype=torch.bool), shift)
    assert site.bias is not None
    for got, old, moved in zip(site.bias, bias, shift, strict=True):
        assert got == (old.float() + moved).to(dtype)
    site.write_(W.float(), torch.ones(64, 8, dtype=torch.bool))
    assert site.bias is not None and torch.equal(site.bias, (bias.float() + shift).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_site_is_a_view_of_the_model(layout: str) -> None:
    W = weights(6, 68)
    site = make_site(W, layout=layout, bias=torch.zeros(6))
    assert torch.equal(site.weight, W) and site.shape == (6, 68)
    storage = site.stored.untyped_storage().data_ptr()
    site.write_(W * 2, torch.ones(6, 68, dtype=torch.bool))
    assert site.stored.untyped_storage().data_ptr() == storage
    stored = site.stored[1] if site.index is not None else site.stored
    assert torch.equal(stored.T if site.transposed else stored, W * 2)
