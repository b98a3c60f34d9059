"""SparseGPT against its pseudocode in float64, and against what is true of any optimal brain surgeon."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import LAYOUTS, count, damped, f64, inputs, make_site, mse, sparsegpt, weights
from torch.testing import assert_close

from llmprune.criteria import criterion
from llmprune.criteria import sparsegpt as module
from llmprune.errors import InputError
from llmprune.patterns import NM, Pattern, Unstructured

UNSTRUCTURED = [(width, sparsity) for width in (63, 68, 132, 260, 300) for sparsity in ("0.5", "0.29")]
N_M = [(width, n, m) for n, m in ((2, 4), (4, 8), (1, 4)) for width in (68, 132, 260, 300) if width % m == 0]
N_M += [(64, 4, 8), (264, 4, 8), (296, 4, 8), (63, 2, 3), (300, 2, 3)]  # 3 does not divide the block of 128 columns


@pytest.mark.parametrize(("width", "sparsity"), UNSTRUCTURED)
def test_unstructured(width: int, sparsity: str) -> None:
    W, x = weights(20, width), inputs(4 * width, width)
    pruned = criterion("sparsegpt").prune(make_site(W, x), Unstructured(float(sparsity)))
    expected, keep = sparsegpt(f64(W), f64(x), sparsity)
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert_close(pruned.weight.double(), torch.from_numpy(expected), rtol=1e-4, atol=2e-5)
    assert pruned.bias_shift is None and pruned.note == ""
    for a in range(0, width, 128):  # the promise is kept in every block of columns
        block = ~pruned.keep[:, a : a + 128]
        assert int(block.sum()) == count(block.numel(), sparsity)


@pytest.mark.parametrize(("width", "n", "m"), N_M)
def test_n_m(width: int, n: int, m: int) -> None:
    W, x = weights(20, width), inputs(4 * width, width)
    pruned = criterion("sparsegpt").prune(make_site(W, x), NM(n, m))
    expected, keep = sparsegpt(f64(W), f64(x), n=n, m=m, B=m * (128 // m))
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert_close(pruned.weight.double(), torch.from_numpy(expected), rtol=1e-4, atol=2e-5)
    assert pruned.keep.view(20, -1, m).sum(-1).unique().tolist() == [n]


def test_n_m_is_decided_on_updated_weights() -> None:
    W, x = weights(20, 68), inputs(272, 68)
    site = make_site(W, x)
    at_once = NM(2, 4).keep(criterion("sparsegpt").score(site))
    assert not torch.equal(criterion("sparsegpt").prune(site, NM(2, 4)).keep, at_once)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_pruned_in_float32(layout: str, dtype: torch.dtype) -> None:
    W, x = weights(20, 68).to(dtype), inputs(272, 68)
    pruned = criterion("sparsegpt").prune(make_site(W, x, layout=layout), NM(2, 4))
    expected, keep = sparsegpt(f64(W), f64(x), n=2, m=4)
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert_close(pruned.weight.double(), torch.from_numpy(expected), rtol=1e-4, atol=2e-5)


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    W, x = weights(20, 68), inputs(272, 68)
    plain = criterion("sparsegpt").prune(make_site(W, x), NM(2, 4))
    for scale in (1e-6, 1e6):
        scaled = criterion("sparsegpt").prune(make_site(W, x * scale), NM(2, 4))
        assert torch.equal(plain.keep, scaled.keep)
        assert_close(plain.weight, scaled.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [68, 132, 260])
def test_one_pruned_column_gives_least_squares_on_the_others(width: int) -> None:
    W, x = weights(20, width), inputs(4 * width, width)
    W = W.sign() * (1 + W.abs())
    W[:, 0] *= 1e-2  # small enough to be the one of `width` weights that goes, in every row
    pruned = criterion("sparsegpt").prune(make_site(W, x), NM(width - 1, width))
    assert (~pruned.keep).nonzero()[:, 1].tolist() == [0] * 20
    H, dense = damped(f64(x)), f64(W)
    best = np.zeros_like(dense)
    best[:, 1:] = np.linalg.solve(H[1:, 1:], (H @ dense.T)[1:]).T
    moved = best - dense
    assert_close(pruned.weight.double() - W.double(), torch.from_numpy(moved), rtol=1e-3, atol=1e-6)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    e = dense[:, 0] / U[0, 0]
    assert np.trace(moved @ H @ moved.T) == pytest.approx(np.sum(e**2), rel=1e-6)
    change = f64(pruned.weight) - dense
    assert np.trace(change @ H @ change.T) == pytest.approx(np.sum(e**2), rel=1e-3)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_uncorrelated_inputs_leave_the_survivors_where_they_are(pattern: Pattern) -> None:
    W, x = weights(20, 132), torch.diag(torch.exp(torch.randn(132)))  # one token per feature: a diagonal Gram
    pruned = criterion("sparsegpt").prune(make_site(W, x), pattern)
    assert torch.equal(pruned.weight, W * pruned.keep)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_uncorrelated_inputs_without_damping_give_wandas_mask(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DAMPING", 1e-12)
    site = make_site(weights(20, 136), torch.diag(torch.exp(torch.randn(136))))
    mask = criterion("sparsegpt").prune(site, NM(n, m)).keep
    assert torch.equal(mask, criterion("wanda").prune(site, NM(n, m)).keep)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(1, 4)])
def test_the_mean_output_error_is_below_that_of_wanda(pattern: Pattern) -> None:
    ours, theirs = [], []
    for seed in range(30):
        W, x = weights(16, 64, seed), inputs(256, 64, seed)
        site, X = make_site(W, x), f64(x)
        whole = mse(f64(W), X)
        ours.append(mse(f64(criterion("sparsegpt").prune(site, pattern).weight - W), X) / whole)
        theirs.append(mse(f64(criterion("wanda").prune(site, pattern).weight - W), X) / whole)
    assert np.mean(ours) < 0.9 * np.mean(theirs)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_dead_columns_end_as_zeros_and_disturb_nothing(pattern: Pattern) -> None:
    W, x = weights(20, 68), inputs(272, 68)
    dead = [0, 2, 17, 67]
    x[:, dead] = 0.0
    pruned = criterion("sparsegpt").prune(make_site(W, x), pattern)
    sparsity = "0.5" if isinstance(pattern, Unstructured) else "0"
    expected, keep = sparsegpt(f64(W), f64(x), sparsity, *((2, 4) if isinstance(pattern, NM) else ()))
    assert not pruned.weight[:, dead].any()
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert_close(pruned.weight.double(), torch.from_numpy(expected), rtol=1e-4, atol=2e-5)
    assert pruned.note == "4 inputs never active, their weights set to zero"


@pytest.mark.parametrize("pattern", [Unstructured(0.29), NM(1, 4)])
def test_inputs_that_were_never_active_give_a_zero_matrix_with_exact_counts(pattern: Pattern) -> None:
    pruned = criterion("sparsegpt").prune(make_site(weights(6, 132), torch.zeros(50, 132)), pattern)
    assert not pruned.weight.any()
    blocks = [int((~pruned.keep[:, a : a + 128]).sum()) for a in (0, 128)]
    assert blocks == ([count(6 * 128, "0.29"), count(6 * 4, "0.29")] if pattern.sparsity < 0.5 else [6 * 96, 6 * 3])


def test_raised_damping_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DAMPING", 1e-10)
    x = torch.randn(3, 68)[torch.randint(0, 3, (2000,))] * 1.7
    pruned = criterion("sparsegpt").prune(make_site(weights(20, 68), x), NM(2, 4))
    assert pruned.note.startswith("damping ")
    assert 1e-10 < float(pruned.note.split()[1]) < 1e-2
    assert torch.isfinite(pruned.weight).all()


def test_a_hopeless_gram_names_the_site() -> None:
    x = inputs(100, 68)
    x[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"h\.3\.c_fc: the Gram matrix"):
        criterion("sparsegpt").prune(make_site(weights(20, 68), x, name="h.3.c_fc"), NM(2, 4))


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_other_groups_are_refused_and_its_own_is_named(group: str) -> None:
    with pytest.raises(InputError, match=f"not per {group}"):
        criterion("sparsegpt").check(Unstructured(0.5, group))
    for pattern in (Unstructured(0.5), NM(2, 4)):
        criterion("sparsegpt").check(pattern)
    assert criterion("sparsegpt").group_name(Unstructured(0.5)) == "block of 128 columns"
    assert criterion("sparsegpt").group_name(NM(2, 4)) == "group of 4 inputs"
