"""The minimax game on quadratic losses, whose curvatures, optimal sets and fixed points are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from llmprune import InputError
from llmprune.structured.minimax import Minimax

Kinds = dict[str, Tensor]
PRICES = {"heads": 100, "channels": 7}
schedules = pytest.mark.parametrize("schedule", ["from_above", "paper"])


def curvatures(blocks: int = 4, heads: int = 8, channels: int = 96) -> Kinds:
    """Second derivatives c of the loss sum c (m - 1)^2 / 2, far from equal, each kind on its own scale."""
    return {"heads": 50 * torch.rand(blocks, heads) + 5, "channels": torch.exp(torch.randn(blocks, channels)) * 0.1}


def share(counts: Mapping[str, int], c: Kinds) -> float:
    """Of the units' parameters, that so many units of each kind hold."""
    return sum(PRICES[k] * n for k, n in counts.items()) / sum(PRICES[k] * c[k].shape[1] for k in counts)


def slopes(c: Kinds, at: Mapping[str, Tensor]) -> Kinds:
    return {kind: c[kind] * (at[kind] - 1) for kind in c}


def project_within(c: Kinds, budget: float) -> Callable[[Mapping[str, float]], dict[str, int]]:
    """Heads as near to their share as leaves a possible number of channels, and the channels still paid for."""

    def project(shares: Mapping[str, float]) -> dict[str, int]:
        heads, channels = (c[kind].shape[1] for kind in PRICES)
        whole = budget * (PRICES["heads"] * heads + PRICES["channels"] * channels)
        rest = {n: math.floor((whole - PRICES["heads"] * n) / PRICES["channels"] + 1e-6) for n in range(1, heads + 1)}
        best = min((n for n in rest if 1 <= rest[n] <= channels), key=lambda n: abs(n - shares["heads"] * heads))
        return {"heads": best, "channels": rest[best]}

    return project


def new_game(c: Kinds, keeps: dict[str, int], schedule: str = "from_above", steps: int = 400, seed: int = 0) -> Minimax:
    """Gates at 1, and the curvature measured."""
    gates = {kind: torch.ones_like(value) for kind, value in c.items()}
    prices = {kind: PRICES[kind] for kind in c}
    game = Minimax(gates, dict(keeps), prices, schedule, steps, share(keeps, c))
    game.probe_(lambda at, number: slopes(c, at), torch.Generator().manual_seed(seed))
    return game


def play(c: Kinds, keeps: dict[str, int], schedule: str = "from_above", noise: float = 0.0, seed: int = 0) -> Minimax:
    """A whole game; `noise` is that of the gradients, as a share of the curvature."""
    game, generator = new_game(c, keeps, schedule, seed=seed), torch.Generator().manual_seed(seed)
    while game.step < game.steps:
        gradient = slopes(c, game.gates)
        for kind in c:
            gradient[kind] += noise * c[kind].mean() * torch.randn(c[kind].shape, generator=generator)
        game.advance_(gradient, project_within(c, game.budget))
    return game


def overlap(game: Minimax, c: Kinds) -> float:
    """Share of what has gone that should have: the units of least curvature in every block."""
    gone = right = 0
    for kind, kept in game.kept.items():
        for row, curvature in zip(kept.tolist(), c[kind].tolist(), strict=True):
            lost = {unit for unit, stays in enumerate(row) if not stays}
            ordered = sorted(range(len(row)), key=lambda unit: curvature[unit])
            gone, right = gone + len(lost), right + len(lost & set(ordered[: len(lost)]))
    return right / gone


def test_the_curvature_is_the_mean_second_derivative() -> None:
    c = curvatures()
    game = new_game(c, {"heads": 5, "channels": 40})
    for kind, value in c.items():
        assert game.curvature[kind] == pytest.approx(sum(value.flatten().tolist()) / value.numel(), rel=1e-4)


def test_the_curvature_is_measured_where_gates_depend_on_each_other() -> None:
    """With the Hessian H of all gates together the random signs leave its diagonal."""
    A = torch.randn(40, 40)
    H = A @ A.T + 40 * torch.eye(40)

    def gradient(at: Mapping[str, Tensor], number: int) -> Kinds:
        m = torch.cat([at["heads"].flatten(), at["channels"].flatten()]) - 1
        return {"heads": (H @ m)[:8].view(2, 4), "channels": (H @ m)[8:].view(2, 16)}

    gates = {"heads": torch.ones(2, 4), "channels": torch.ones(2, 16)}
    game = Minimax(gates, {"heads": 2, "channels": 8}, PRICES, "from_above", 100, 0.5)
    game.probe_(gradient, torch.Generator().manual_seed(0))
    assert game.curvature["heads"] == pytest.approx(H.diagonal()[:8].mean().item(), rel=0.35)
    assert game.curvature["channels"] == pytest.approx(H.diagonal()[8:].mean().item(), rel=0.35)


def test_with_fixed_prices_gates_end_where_loss_and_price_balance() -> None:
    """0 = c (m - 1) + 2 y m, so m = c / (c + 2 y); in the first tenth of the steps y is fixed."""
    c = {"heads": torch.rand(3, 6) * 4 + 0.2}
    game = new_game(c, {"heads": 3}, steps=30_000)
    price = game.duals["heads"].clone()
    for _ in range(2_900):
        game.advance_(slopes(c, game.gates), lambda shares: {})
    assert torch.equal(game.duals["heads"], price) and (price > 0).all()
    scaled = c["heads"] / c["heads"].mean()
    balance = scaled / (scaled + 2 * price[:, None])
    free = game.gates["heads"] >= 1 - 1e-5  # without a price
    assert (free.sum(1) <= 1).all()
    torch.testing.assert_close(game.gates["heads"], torch.where(free, 1.0, balance), rtol=1e-4, atol=1e-5)


def test_a_priced_gate_without_gradient_shrinks_by_the_proximal_factor() -> None:
    """(1 + 2 eta y)^-t; a gate of five times the mean curvature or more has a smaller rate eta."""
    c = {"heads": torch.tensor([[1.0] * 15 + [25.0]] * 2)}
    game = new_game(c, {"heads": 4}, steps=1_000)
    price = game.duals["heads"][0].item()
    for _ in range(60):
        game.advance_({"heads": torch.zeros(2, 16)}, lambda shares: {})
    mean = 40 / 16
    for row in game.gates["heads"].tolist():
        assert sum(value > 1 for value in row) <= 1  # begins above 1, and stays without a price
        for value, curvature in zip(row, [1.0] * 15 + [25.0], strict=True):
            eta = 0.1 * min(1.0, 5 * mean / curvature)
            assert value > 1 or value == pytest.approx((1 + 2 * eta * price) ** -60, rel=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_from_above_finds_the_best_set(noise: float) -> None:
    c = curvatures()
    game = play(c, {"heads": 5, "channels": 40}, noise=noise)
    assert overlap(game, c) >= 0.95


@pytest.mark.parametrize("curvature", [[1.0, 10.0], [10.0, 1.0], [5.0, 1.0, 9.0], [1.0, 9.0, 5.0], [9.0, 5.0, 1.0]])
def test_few_units_are_told_apart_in_any_order(curvature: list[float]) -> None:
    c = {"heads": torch.tensor([curvature] * 3)}
    assert overlap(play(c, {"heads": len(curvature) - 1}), c) == 1
    assert overlap(play(c, {"heads": 1}), c) == 1


@schedules
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_prices_are_never_negative(schedule: str, noise: float) -> None:
    c, keeps = curvatures(), {"heads": 5, "channels": 40}
    game, moved = new_game(c, keeps, schedule), set()
    while game.step < game.steps:
        gradient = slopes(c, game.gates)
        gradient = {k: g + noise * c[k].mean() * torch.randn(g.shape) for k, g in gradient.items()}
        game.advance_(gradient, project_within(c, game.budget))
        assert game.multiplier >= 0
        assert all((value >= 0).all() for value in game.duals.values())
        assert all(0 <= value < 1 for value in game.removed.values())
        moved.add((game.multiplier, *(value.sum().item() for value in game.duals.values())))
    assert len(moved) > 100


def test_a_budget_that_is_not_used_up_has_no_price() -> None:
    c = curvatures()
    game = new_game(c, {"heads": 5, "channels": 40}, "paper")
    game.removed = {"heads": 0.9, "channels": 0.9}
    for _ in range(5):
        game.advance_(slopes(c, game.gates), project_within(c, game.budget))
        assert game.kept_share() < game.budget
        assert game.multiplier == 0


@schedules
@pytest.mark.parametrize("keeps", [{"heads": 5, "channels": 40}, {"heads": 7, "channels": 90}])
def test_the_budget_is_met_exactly_and_alike_in_all_blocks(schedule: str, keeps: dict[str, int]) -> None:
    c = curvatures()
    game = play(c, keeps, schedule)
    budget = share(keeps, c)
    if schedule == "from_above":
        assert game.keeps == keeps
        assert game.kept_share() == pytest.approx(budget)
    for kind, gates in game.gates.items():
        assert game.kept[kind].sum(1).tolist() == [game.keeps[kind]] * 4
        assert torch.equal(gates != 0, game.kept[kind])
    spent = share(game.keeps, c)
    assert budget - PRICES["channels"] / (8 * 100 + 96 * 7) < spent <= budget + 1e-9


def test_widths_learned_from_nothing_leave_the_dearer_kind() -> None:
    """Heads and channels hold as many parameters; losing the channels costs a hundred times more."""
    c = {"heads": torch.full((3, 8), 0.1), "channels": torch.full((3, 114), 10.0)}
    c = {kind: value * (torch.rand(value.shape) + 0.5) for kind, value in c.items()}
    game = play(c, {"heads": 4, "channels": 57}, "paper")
    assert game.keeps["heads"] / 8 < game.keeps["channels"] / 114


@schedules
def test_the_same_seed_gives_the_same_masks(schedule: str) -> None:
    c, keeps = curvatures(), {"heads": 5, "channels": 40}
    games = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        games.append(play(c, keeps, schedule, noise=1.0, seed=3))
    other = play(c, keeps, schedule, noise=1.0, seed=4)
    for kind in c:
        assert torch.equal(games[0].gates[kind], games[1].gates[kind])
        assert not torch.equal(games[0].gates[kind], other.gates[kind])


@pytest.mark.parametrize("curvature", [0.0, -1.0, math.nan])
def test_a_loss_without_curvature_teaches_nothing(curvature: float) -> None:
    c = {"heads": torch.full((2, 4), curvature), "channels": torch.ones(2, 8)}
    with pytest.raises(InputError, match="heads") as error:
        new_game(c, {"heads": 2, "channels": 4})
    assert "\n" not in str(error.value)


def test_a_kind_that_keeps_everything_is_left_alone() -> None:
    c = curvatures()
    game = play(c, {"heads": 8, "channels": 40}, noise=1.0)
    assert torch.equal(game.gates["heads"], torch.ones(4, 8))
    assert game.kept["channels"].sum(1).tolist() == [40] * 4
