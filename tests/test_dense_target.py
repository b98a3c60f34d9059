"""The dense model's output as the target: the formula, and whole models against brute force."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import all_slots
from dense_by_hand import JOINING, JOINS, regress_by_hand, ridge
from families import FAMILIES
from literal import Matrix, damped, f64, inputs, make_site, weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune import PruneConfig, PruneResult, prune
from llmprune.criteria.regress import Regress
from llmprune.cross import Cross
from llmprune.inputs import InputStatistics
from llmprune.sites import Site
from llmprune.targets import dense_target, wanted_output

OUT, WIDTH = 20, 68

pytestmark = pytest.mark.usefixtures("one_thread")
both_means = pytest.mark.parametrize("centred", [False, True])
both_sides = pytest.mark.parametrize("of_output", [False, True])


def site_with(z: Tensor, x: Tensor, bias: Tensor | None, of_output: bool) -> Site:
    """A site that has received x while the dense model has z, in uneven batches."""
    site = make_site(weights(OUT, WIDTH), bias=bias)
    site.statistics = InputStatistics(
        WIDTH, {"covariance"}, "cpu", Cross(z.shape[1], WIDTH, "cpu", of_output=of_output)
    )
    for part in zip(z.split(100), x.split(100), strict=True):
        site.statistics.update(part[1], part[0])
    return site


def received(constant: bool = True) -> tuple[Tensor, Tensor]:
    """What enters the dense and the pruned site: alike, but moved; one feature is dead, one never varies."""
    x = inputs(400, WIDTH, mean=2.0)
    z = 0.8 * x + 0.4 * inputs(400, WIDTH, seed=1)
    if constant:
        x[:, 3], z[:, 3], x[:, 5] = 0.0, 0.0, 2.0
    return z, x


def literal_target(W: Matrix, b: Matrix, z: Matrix, x: Matrix, of_output: bool, centred: bool,
                   mix: float) -> tuple[Matrix, Matrix]:  # fmt: skip
    """W_t and the mean, as in the docstring of `dense_target`."""
    wanted = z - b if of_output else z @ W.T
    mean = mix * wanted.mean(0) + (1 - mix) * (x @ W.T).mean(0)
    if centred:
        wanted, x = wanted - wanted.mean(0), x - x.mean(0)
    H, damp = x.T @ x, damped(x, ridge(*x.shape))
    W_t = (mix * wanted.T @ x + (1 - mix) * W @ H + W @ (damp - H)) @ np.linalg.inv(damp)
    return W_t, mean


def assert_near(found: Tensor, expected: Matrix, tolerance: float) -> None:
    assert np.abs(f64(found) - expected).max() < tolerance * np.abs(expected).max()


@both_means
@both_sides
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_target_is_that_of_the_formula(centred: bool, of_output: bool, mix: float, bias: bool) -> None:
    z, x = received()
    b = torch.linspace(-3, 3, OUT) if bias else None
    if of_output:
        z = z @ weights(OUT, WIDTH, seed=1).T + 1.5
    site = site_with(z, x, b, of_output)
    target, _ = dense_target(site, centred, mix)
    offset = np.zeros(OUT) if b is None else f64(b)
    W_t, mean = literal_target(f64(site.weight), offset, f64(z), f64(x), of_output, centred, mix)
    assert_near(target.weight, W_t, 2e-5)
    assert_near(target.mean, mean, 1e-5)
    if mix == 0:
        assert_near(target.weight, f64(site.weight), 2e-5)
    else:
        assert np.abs(W_t - f64(site.weight)).max() > 0.1


@both_means
@both_sides
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_the_target_of_what_has_not_changed_is_the_dense_site(centred: bool, of_output: bool, mix: float) -> None:
    x, b = received()[1], torch.linspace(-3, 3, OUT)
    z = x @ weights(OUT, WIDTH).T + b if of_output else x
    site = site_with(z, x, b, of_output)
    target, _ = dense_target(site, centred, mix)
    assert_near(target.weight, f64(site.weight), 2e-5)
    assert_near(target.mean, f64(x).mean(0) @ f64(site.weight).T, 1e-5)


@both_sides
def test_the_wanted_output_is_the_dense_one_without_the_bias(of_output: bool) -> None:
    z, x = received()
    b = torch.linspace(-3, 3, OUT)
    if of_output:
        z = z @ weights(OUT, WIDTH, seed=1).T
    site = site_with(z, x, b, of_output)
    assert site.statistics is not None
    assert torch.equal(wanted_output(site), site.statistics.sample @ site.weight.T)
    site.target, _ = dense_target(site, True, 1.0)
    taken = torch.cat([part[::3][:32] for part in z.split(100)])
    assert torch.equal(site.statistics.dense_sample, taken)
    torch.testing.assert_close(wanted_output(site), taken - b if of_output else taken @ site.weight.T)


def built(name: str, **options: Any) -> tuple[PreTrainedModel, PruneResult]:
    """A dense model and the pruned one."""
    torch.manual_seed(0)
    dense = FAMILIES[name].build()
    settings = {"method": "wanda", "compensation": "least-squares", "target": "dense", "sequential": "site"}
    windows = options.pop("tokens")
    config = PruneConfig(**{**settings, "device": "cpu", "batch_size": 4, **options})
    return dense, prune(copy.deepcopy(dense), config, tokens=windows)


def with_biases_of(pruned: PreTrainedModel, dense: PreTrainedModel) -> PreTrainedModel:
    """A copy of `dense` with zeros where only `pruned` has a bias."""
    working = copy.deepcopy(dense)
    for name, module in working.named_modules():
        bias = getattr(pruned.get_submodule(name), "bias", None)
        if bias is not None and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(bias))
    return working


BIASES = {"llama": ["mlp_bias", "attention_bias"], "opt": [], "gptj": [], "gemma2": ["attention_bias"],
          "olmo2": ["attention_bias"], "falcon": ["bias"]}  # fmt: skip
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in JOINS],
    ("llama", {"residual": 0.0}),
    ("opt", {"sequential": "block"}),
    ("gptj", {"mix": 0.5, "residual": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_whole_models_match_brute_force(name: str, options: dict[str, Any], windows: Tensor) -> None:
    family = FAMILIES[name]
    dense, result = built(name, tokens=windows, **options)
    assert result.report.bias_flags == BIASES[name]
    theirs, working = all_slots(result.model, family), with_biases_of(result.model, dense)
    with torch.no_grad():
        expected = regress_by_hand(
            name, family, dense, working, windows, lambda site: theirs[site].weight != 0, **options
        )
    assert expected.keys() == theirs.keys()
    strange = 0
    for site, solved in expected.items():
        # Conjugate gradients stop at a residual of 3e-4; what is left of it, the sites after this one see.
        weight = theirs[site].weight.double()
        bias: Any = result.model.get_submodule(site).bias
        assert (weight - solved.weight).norm() < 3e-3 * solved.weight.norm(), site
        assert (bias is None) == (solved.bias is None)
        if bias is not None and solved.bias is not None:
            assert (bias - solved.bias).norm() < 5e-3 * solved.bias.norm(), site
        strange += int(((weight != 0) != solved.keep).sum())
    assert strange < 0.01 * sum(slot.weight.numel() for slot in theirs.values())
    with torch.no_grad():
        found, wanted = (model(input_ids=windows).logits for model in (result.model, working))
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_oss"])
def test_batches_do_not_matter(name: str, windows: Tensor) -> None:
    (dense, one), (_, four) = (built(name, tokens=windows, batch_size=size) for size in (1, 4))
    sites = [all_slots(result.model, FAMILIES[name]).values() for result in (one, four)]
    masks = [torch.cat([(slot.weight != 0).flatten() for slot in slots]) for slots in sites]
    assert (masks[0] != masks[1]).double().mean() < 2e-3
    with torch.no_grad():
        logits = [model(input_ids=windows).logits for model in (one.model, four.model, dense)]
    assert (logits[0] - logits[1]).norm() < 0.05 * (logits[0] - logits[2]).norm()


def dense_means(model: PreTrainedModel, windows: Tensor, of_output: dict[str, bool]) -> dict[str, Tensor]:
    """Of what the modules return, or receive, over all windows."""
    means: dict[str, Tensor] = {}
    for name, output_wanted in of_output.items():

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name,
                  output_wanted: bool = output_wanted) -> None:  # fmt: skip
            means[name] = (output if output_wanted else args[0]).double().flatten(0, -2).mean(0)

        model.get_submodule(name).register_forward_hook(after)
    with torch.no_grad():
        model(input_ids=windows)
    return means


@pytest.mark.parametrize("residual", [0.0, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_regress_on_every_family(name: str, residual: float, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Cross] = {}
    score = Regress.score

    def spy(self: Regress, site: Site) -> Tensor:
        if site.statistics is not None and site.statistics.cross is not None:
            seen[site.name] = site.statistics.cross
        return score(self, site)

    monkeypatch.setattr(Regress, "score", spy)
    dense = FAMILIES[name].build()
    pruned = copy.deepcopy(dense)
    config = PruneConfig(method="regress", residual=residual, device="cpu", batch_size=4)
    report = prune(pruned, config, tokens=windows).report
    for site, slot in all_slots(pruned, FAMILIES[name]).items():
        assert torch.isfinite(slot.weight).all(), site
        assert ((slot.weight == 0).sum(1) == slot.weight.shape[1] // 2).all(), site
    sites = [site for block in report.blocks for site in block.sites]
    own = {site.name for site in sites if "own target" in site.note}
    assert own == {site.name for site in sites if site.name.split(".")[-1].isdigit()}
    assert own | seen.keys() == {site.name for site in sites} and not own & seen.keys()
    joining = {site for site, cross in seen.items() if cross.of_output}
    assert {name_in_block(site, FAMILIES[name].blocks) for site in joining} == JOINING[name]
    # With `residual` the sites that join the stream are given more than the dense model's output.
    checked = {site: cross.of_output for site, cross in seen.items() if not (residual and cross.of_output)}
    for site, mean in dense_means(dense, windows, checked).items():
        assert (seen[site].z_mean - mean).norm() < 1e-4 * mean.norm(), site


def name_in_block(site: str, blocks: str) -> str:
    return site.removeprefix(f"{blocks}.").partition(".")[2]
