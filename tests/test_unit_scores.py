"""Scores of whole units: each method on a site against its formula, and which of them take a uniform pattern."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from literal import Matrix, damped, f64, inputs, keep_of_list, make_site, stade, stade_bias, wanda, weights
from tiny import make_llama
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmprune import InputError, PruneConfig, prune
from llmprune.criteria.magnitude import Magnitude
from llmprune.criteria.obs import OBS
from llmprune.criteria.stade import Stade
from llmprune.criteria.taylor import Taylor
from llmprune.criteria.wanda import Wanda
from llmprune.least_squares import least_squares
from llmprune.patterns import Columns
from llmprune.sites import Site

OUT = 20
pytestmark = pytest.mark.usefixtures("one_thread")
sizes = pytest.mark.parametrize(("width", "size"), [(36, 1), (36, 4), (35, 7), (40, 20)])


def keep_units(scores: Matrix, size: int, kept: int) -> Matrix:
    """bool [out, in]: sum over rows and columns, sort, and prune the first."""
    units = scores.shape[1] // size
    totals = [sum(float(s) for s in scores[:, u * size : (u + 1) * size].flatten()) for u in range(units)]
    keep = keep_of_list(totals, units - kept)
    return np.array([[keep[j // size] for j in range(scores.shape[1])]] * len(scores))


@sizes
def test_exactly_the_promised_units_stay_under_ties(width: int, size: int) -> None:
    units = width // size
    for kept in range(1, units + 1):
        for scores in (torch.ones(OUT, width), torch.randint(0, 2, (OUT, width)).float()):
            keep = Columns(size, kept).keep(scores, "row")
            assert np.array_equal(keep.numpy(), keep_units(f64(scores), size, kept))
            assert keep.sum() == OUT * size * kept


def test_a_unit_counts_by_its_sum_not_by_its_best() -> None:
    scores = torch.zeros(2, 6)
    scores[0, 0] = 5.0  # one large entry
    scores[:, 2:4] = 1.5  # many small ones
    scores[1, 4:] = 0.1
    assert Columns(2, 1).keep(scores, "row")[0].tolist() == [False, False, True, True, False, False]
    assert Columns(2, 2).keep(scores, "matrix")[1].tolist() == [True, True, True, True, False, False]


@sizes
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("method", ["wanda", "stade", "magnitude"])
def test_scores_of_weights_add_up_to_scores_of_units(method: str, layout: str, width: int, size: int) -> None:
    W, x, bias = weights(OUT, width), inputs(300, width), torch.linspace(-1, 1, OUT)
    site = make_site(W, x, bias=bias, layout=layout)
    kept = max(1, width // size // 2)
    criterion = {"wanda": Wanda, "stade": Stade, "magnitude": Magnitude}[method]()
    pruned = criterion.prune(site, Columns(size, kept))
    literal = {"wanda": wanda, "stade": stade, "magnitude": lambda W, X: np.abs(W)}[method](f64(W), f64(x))
    expected = keep_units(literal, size, kept)
    assert np.array_equal(pruned.keep.numpy(), expected)
    assert np.array_equal(f64(pruned.weight), np.where(expected, f64(W), 0.0))
    if method == "stade":
        assert pruned.bias_shift is not None
        assert f64(pruned.bias_shift) == pytest.approx(stade_bias(f64(W), f64(x), expected), rel=1e-4, abs=1e-4)
    else:
        assert pruned.bias_shift is None


def remaining_error(W: Matrix, H: Matrix, columns: list[int]) -> float:
    """What the best weights on some columns still miss of W x."""
    change = W.copy()
    if columns:
        solved = np.linalg.solve(H[np.ix_(columns, columns)], H[columns] @ W.T).T
        change[:, columns] -= solved
    return float(np.einsum("ri,ij,rj->", change, H, change))


def greedy_order(W: Matrix, H: Matrix, size: int) -> list[int]:
    """Remove the unit without which the least squares of all the others, from scratch, miss least."""
    left, order = list(range(W.shape[1] // size)), []
    while left:
        errors = {u: remaining_error(W, H, [v * size + i for v in left if v != u for i in range(size)]) for u in left}
        gone = min(left, key=lambda u: errors[u])
        left.remove(gone)
        order.append(gone)
    return order


@pytest.mark.parametrize(("width", "size"), [(16, 1), (24, 3), (40, 10)])
@pytest.mark.parametrize("centred", [False, True])
def test_obs_removes_in_the_order_of_brute_force(width: int, size: int, centred: bool) -> None:
    W, x = weights(OUT, width), inputs(200, width, mean=2.0)
    site = make_site(W, x, bias=torch.zeros(OUT) if centred else None,
                     needs=frozenset({"covariance" if centred else "gram"}))  # fmt: skip
    site.pattern = Columns(size, 2)
    score = OBS(compensation="bias" if centred else "none").score(site)
    X = f64(x) - f64(x).mean(0) if centred else f64(x)
    order = greedy_order(f64(W), damped(X), size)
    assert score.shape == (OUT, width)
    assert (score == score[0]).all()
    assert score[0].view(-1, size).argsort(0)[:, 0].tolist() == order
    for unit in score[0].view(-1, size):
        assert len(unit.unique()) == 1


@sizes
def test_least_squares_on_shared_columns_is_that_of_numpy(width: int, size: int) -> None:
    W, x = weights(OUT, width), inputs(300, width)
    H = damped(f64(x)) / 300
    keep = Columns(size, width // size // 2).keep(torch.rand(OUT, width), "row")
    solved, residual = least_squares(torch.from_numpy(H).float(), W, keep)
    columns = np.flatnonzero(keep[0].numpy())
    expected = np.zeros((OUT, width))
    expected[:, columns] = np.linalg.solve(H[np.ix_(columns, columns)], H[columns] @ f64(W).T).T
    assert np.abs(f64(solved) - expected).max() < 1e-4 * np.abs(expected).max()
    assert not solved[~keep].any()
    assert residual < 1e-4


def test_least_squares_lowers_the_output_error_of_every_site(windows: Tensor) -> None:
    model = make_llama(attention_bias=True, mlp_bias=True)
    errors = []
    for compensation in ("none", "bias", "least-squares"):
        config = PruneConfig(method="wanda", pattern="uniform", sparsity=0.5, compensation=compensation, device="cpu")
        report = prune(copy.deepcopy(model), config, tokens=windows).report
        assert report.widths is not None and report.widths["kept"] == {"self_attn.o_proj": 1, "mlp.down_proj": 33}
        errors.append([site.relative_error for site in report.blocks[0].sites])
    for plain, moved, solved in zip(*errors, strict=True):
        assert plain is not None and moved is not None and solved is not None
        assert solved < moved < plain


def cross_entropies(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """[n], of each window."""
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return each.view(len(windows), -1).mean(1)


def slope(model: PreTrainedModel, weight: Tensor, columns: slice, windows: Tensor, h: float = 0.02) -> Tensor:
    """[n]: how fast each window's loss changes with a factor on some columns of an output projection, by five points.

    So far apart because the norms compute in float32 whatever they are given.
    """
    dense, total = weight.clone(), torch.zeros(len(windows), dtype=torch.float64)
    for steps, share in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        weight[:, columns] = (1 + steps * h) * dense[:, columns]
        total += share * cross_entropies(model, windows) / (12 * h)
        weight.copy_(dense)
    return total


def test_taylor_is_the_squared_slope_of_the_loss_at_every_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(num_hidden_layers=2, intermediate_size=12)
    windows = torch.randint(0, 97, (5, 10))
    exact = copy.deepcopy(model).double()
    found: dict[str, Tensor] = {}
    score = Taylor.score

    def spy(self: Taylor, site: Site) -> Tensor:
        found[site.name] = score(self, site).clone()
        return found[site.name]

    monkeypatch.setattr(Taylor, "score", spy)
    prune(model, PruneConfig(method="taylor", sparsity=0.2, device="cpu"), tokens=windows)
    sites = {f"model.layers.{i}.{site}": size for i in range(2) for site, size in
             {"self_attn.o_proj": 16, "mlp.down_proj": 1}.items()}  # fmt: skip
    assert found.keys() == sites.keys()
    for name, size in sites.items():
        weight = exact.get_submodule(name).weight.data
        units = [slice(a, a + size) for a in range(0, weight.shape[1], size)]
        expected = torch.stack([slope(exact, weight, unit, windows).square().mean() for unit in units])
        got = found[name][0].view(-1, size)
        assert (found[name] == found[name][0]).all() and (got == got[:, :1]).all()
        torch.testing.assert_close(got[:, 0].double(), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "maskprune", "pattern": "2:4"}, "maskprune .* 2:4"),
    ({"method": "obs", "pattern": "2:4"}, "obs .* 2:4"),
    ({"method": "taylor", "pattern": "2:4"}, "taylor .* 2:4"),
    ({"method": "taylor", "pattern": "row"}, "taylor"),
    ({"method": "sparsegpt", "pattern": "uniform"}, "sparsegpt .*--method obs"),
    ({"method": "wanda", "pattern": "uniform", "refine": "swap"}, "swaps .* uniform"),
])  # fmt: skip
def test_what_does_not_fit_a_pattern_is_said_in_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        PruneConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["maskprune", "obs", "taylor"])
def test_methods_on_units_are_uniform_by_default(method: str) -> None:
    assert str(PruneConfig(method=method).make_pattern()) == "uniform 0.2"
