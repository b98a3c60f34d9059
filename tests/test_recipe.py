"""Criterion, refinement and compensation together, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES
from literal import (
    CASES,
    Matrix,
    damped,
    f64,
    inputs,
    literal_keep,
    make_pattern,
    make_site,
    row_by_row,
    sparsegpt,
    weights,
)
from literal import wanda as wanda_scores
from tiny import WEIGHT_METHODS
from torch.testing import assert_close

from llmprune import PruneConfig, prune
from llmprune.criteria import criterion
from llmprune.errors import InputError
from llmprune.least_squares import TOLERANCE
from llmprune.patterns import NM, Unstructured
from llmprune.recipe import Recipe
from llmprune.sites import Site


def made(method: str, pattern: object = None, refine: str = "none", compensation: str | None = None) -> Recipe:
    recipe = Recipe(criterion(method, 0, compensation), pattern or Unstructured(0.5), refine)
    recipe.check()
    return recipe


def site_for(recipe: Recipe, width: int, bias: bool, seed: int = 0) -> tuple[Site, Matrix, Matrix]:
    """A site that has seen what the recipe needs, its weights and its inputs."""
    W, x = weights(20, width, seed), inputs(4 * width, width, seed, mean=2.0)
    site = make_site(W, x, bias=torch.zeros(20) if bias else None, needs=recipe.needs)
    return site, f64(W), f64(x)


def ridge(X: Matrix) -> float:
    """A hundredth, and as many tokens as there are features."""
    return 0.01 + X.shape[1] / X.shape[0]


def objective(H: Matrix, change: Matrix) -> float:
    return float(np.einsum("ri,ij,rj->", change, H, change))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("text", "sparsity", "width"), CASES)
def test_least_squares_on_wandas_mask(text: str, sparsity: str, width: int, bias: bool) -> None:
    recipe = made("wanda", make_pattern(text, sparsity), compensation="least-squares")
    site, W, X = site_for(recipe, width, bias)
    pruned = recipe.prune(site)
    keep = literal_keep(wanda_scores(W, X), text, sparsity, "row")
    H = damped(X - X.mean(0) if bias else X, ridge(X))
    expected = row_by_row(H, W, keep)
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert objective(H, f64(pruned.weight) - W) == pytest.approx(objective(H, expected - W), rel=1e-4)
    assert_close(pruned.weight.double(), torch.from_numpy(expected), rtol=0, atol=0.05)
    assert pruned.residual is not None
    assert pruned.residual <= TOLERANCE
    if bias:
        assert pruned.bias_shift is not None
        shift = (W - f64(pruned.weight)) @ X.mean(0)
        assert_close(pruned.bias_shift.double(), torch.from_numpy(shift), rtol=1e-3, atol=1e-3)
    else:
        assert pruned.bias_shift is None
        assert pruned.note == "no bias to move"


@pytest.mark.parametrize("method", [name for name in WEIGHT_METHODS if name not in ("sparsegpt", "regress")])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_each_part_lowers_the_error(method: str, pattern: object, bias: bool) -> None:
    errors = []
    for refine, compensation in (("none", "none"), ("none", "least-squares"), ("swap", "least-squares")):
        recipe = made(method, pattern, refine, compensation)
        site, W, X = site_for(recipe, 132, bias)
        pruned = recipe.prune(site)
        shift = 0.0 if pruned.bias_shift is None else f64(pruned.bias_shift)
        errors.append(float(np.mean((X @ (f64(pruned.weight) - W).T + shift) ** 2)))
        assert int(pruned.keep.sum()) == 20 * 66
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.97 * errors[1]


def test_swaps_alone_keep_the_dense_weights() -> None:
    recipe = made("wanda", NM(2, 4), "swap")
    site, W, X = site_for(recipe, 132, bias=False)
    pruned, plain = recipe.prune(site), made("wanda", NM(2, 4)).prune(site)
    assert torch.equal(pruned.weight, site.weight * pruned.keep)
    assert (pruned.keep.view(20, -1, 4).sum(-1) == 2).all()
    H = damped(X, ridge(X))
    assert objective(H, f64(pruned.weight) - W) < 0.9 * objective(H, f64(plain.weight) - W)
    assert pruned.bias_shift is None


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_sparsegpt_with_a_bias_works_on_the_covariance(pattern: object) -> None:
    recipe = made("sparsegpt", pattern, compensation="bias")
    site, W, X = site_for(recipe, 132, bias=True)
    pruned = recipe.prune(site)
    how = {"sparsity": "0.5"} if isinstance(pattern, Unstructured) else {"n": 2, "m": 4}
    expected, keep = sparsegpt(W, X - X.mean(0), **how)
    assert np.array_equal(pruned.keep.numpy(), keep)
    assert_close(pruned.weight.double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)
    assert pruned.bias_shift is not None
    assert_close(pruned.bias_shift.double(), torch.from_numpy((W - expected) @ X.mean(0)), rtol=1e-3, atol=1e-3)


def test_the_statistics_follow_from_the_parts() -> None:
    for method, refine, compensation, needs in (
        ("magnitude", "none", None, set()),
        ("magnitude", "none", "bias", {"moments"}),
        ("magnitude", "swap", None, {"gram"}),
        ("wanda", "none", None, {"moments"}),
        ("wanda", "none", "least-squares", {"covariance"}),
        ("stade", "swap", None, {"covariance"}),
        ("stade", "swap", "none", {"gram"}),
        ("sparsegpt", "none", None, {"gram"}),
        ("sparsegpt", "none", "bias", {"covariance"}),
    ):
        assert made(method, refine=refine, compensation=compensation).needs == needs
    for options, needs in (
        ({"method": "wanda", "target": "dense"}, {"gram", "cross"}),
        ({"method": "sparsegpt", "target": "dense", "compensation": "bias"}, {"covariance", "cross"}),
        ({"method": "regress"}, {"covariance", "cross"}),
        ({"method": "regress", "target": "own"}, {"covariance"}),
    ):
        assert PruneConfig(**options).make_recipe().needs == needs


def test_the_manifest_says_what_was_chosen() -> None:
    def axes(**options: object) -> list[str]:
        config = PruneConfig(**options).as_dict()
        return [config[name] for name in ("refine", "compensation", "sequential", "target")]

    assert axes(method="regress") == ["swap", "least-squares", "site", "dense"]
    assert axes(method="regress", sequential="block") == ["swap", "least-squares", "block", "dense"]
    assert axes(method="stade", refine="swap") == ["swap", "bias", "block", "own"]


def test_parts_that_do_not_fit_are_refused() -> None:
    for method, refine, compensation, message in (
        ("sparsegpt", "swap", None, "add --compensation least-squares"),
        ("sparsegpt", "swap", "bias", "add --compensation least-squares"),
        ("wanda", "exchange", None, "refine 'exchange' is unknown: choose from none, swap"),
        ("wanda", "none", "lsq", "compensation 'lsq' is unknown: choose from none, bias, least-squares"),
    ):
        with pytest.raises(InputError, match=message):
            PruneConfig(method=method, refine=refine, compensation=compensation)
    for options, message in (
        ({"sequential": "row"}, "sequential 'row' is unknown: choose from block, site"),
        ({"target": "sparse"}, "target 'sparse' is unknown: choose from own, dense"),
        ({"residual": float("nan"), "method": "regress"}, "residual is nan: give a number from 0 to 1"),
        ({"residual": 0.5}, "residual is part of a dense target, and the target is own: add --target dense"),
        ({"mix": 0.0, "target": "own"}, "mix is part of a dense target, and the target is own: add --target dense"),
        ({"mix": 1.5, "target": "dense"}, "mix is 1.5: give a number from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            PruneConfig(**options)
    PruneConfig(method="sparsegpt", refine="swap", compensation="least-squares")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gains(name: str, windows: torch.Tensor) -> None:
    errors = []
    for options in ({}, {"refine": "swap", "compensation": "least-squares"}):
        torch.manual_seed(0)
        report = prune(FAMILIES[name].build(), PruneConfig(device="cpu", **options), tokens=windows).report
        errors.append({site.name: site.relative_error or 0.0 for site in report.blocks[0].sites})
        assert report.sparsity == pytest.approx(0.5, abs=0.02)
    plain, moved = errors
    assert plain.keys() == moved.keys()
    assert all(moved[site] < plain[site] for site in plain)
