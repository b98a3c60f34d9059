"""The minimax game of MaskPrune (our reconstruction): gates against dual prices, with one width for all blocks.

    min over gates m, max over prices y >= 0:   loss(m) + sum over blocks of y * (sum of the s smallest m^2)

s units are to go in every block. Nothing here knows a model: a step is given the gradient of the loss. The idea is
arXiv 2502.14008, whose equations were not read; proximal step, prices and straight-through widths follow UVC
(arXiv 2203.08243), the curvature scale and the schedule from above are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import InputError

SCHEDULES = ("from_above", "paper")
RATE = 0.1
LARGEST_STEP = 0.1
PROBE = 0.05
PROBES = 4
PRICE = {"from_above": 1.0, "paper": 1e-3}
PRICE_RATE = {"from_above": 400.0, "paper": 20.0}
"""First duals, and how far they rise over a whole run with priced gates at 1; both in units of the curvature. Too low,
and units still carry weight when the set is fixed."""
WIDTH_RATE = 0.02
SORT, RAMP, CHOOSE = 0.1, 0.7, 0.8
"""Shares of the steps: until SORT all units are priced; until RAMP ever fewer; at CHOOSE the set is fixed."""

Gradient = Callable[[Mapping[str, Tensor]], tuple[float, dict[str, Tensor]]]
"""Loss and its gradient at given gates."""
Project = Callable[[Mapping[str, float]], dict[str, int]]
"""Shares that are to stay -> units that stay, within the budget."""


@dataclass
class Minimax:
    """The state of the game; everything in it is needed to go on after an interruption.

    Attributes:
        gates: [blocks, units] float32 by kind of unit.
        keeps: units of a kind that stay in every block in the end.
        prices: parameters that one unit of a kind holds.
        schedule: one of SCHEDULES.
        steps: of the whole game.
        budget: share of all units' parameters that stays.
        curvature: mean second derivative of the loss at a kind's gates: the scale of its gradients and duals.
        rates: [blocks, units], of the gates.
        duals: [blocks] by kind, in units of the curvature; never negative.
        removed: share of a kind's units that goes; learned by the schedule "paper".
        multiplier: dual of the budget, never negative; used by "paper".
        kept: bool [blocks, units] by kind once the set is fixed.
        order: [blocks, units] of the kinds whose units go in an order known beforehand, the smallest first; those of
            the others go by their gates.
    """

    gates: dict[str, Tensor]
    keeps: dict[str, int]
    prices: dict[str, int]
    schedule: str
    steps: int
    budget: float
    curvature: dict[str, float] = field(default_factory=dict)
    rates: dict[str, Tensor] = field(default_factory=dict)
    duals: dict[str, Tensor] = field(default_factory=dict)
    removed: dict[str, float] = field(default_factory=dict)
    multiplier: float = 0.0
    step: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    order: Mapping[str, Tensor] = field(default_factory=dict)

    def probe_(
        self, gradient: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]], generator: torch.Generator
    ) -> None:
        """Measure the curvature at the gates by random signs (Hutchinson), and set the rates by it.

        Args:
            gradient: of the loss at given gates, on the batch of a given number.

        Raises:
            InputError: the loss shows no curvature: there is nothing to learn from.
        """
        sums = {kind: torch.zeros_like(value) for kind, value in self.gates.items()}
        probes = 0
        for count in (PROBES, PROBES, 2 * PROBES):
            for _ in range(count):
                signs = {
                    k: (torch.rand(v.shape, generator=generator) < 0.5).to(v) * 2 - 1 for k, v in self.gates.items()
                }
                plus = gradient({k: v + PROBE * signs[k] for k, v in self.gates.items()}, probes)
                minus = gradient({k: v - PROBE * signs[k] for k, v in self.gates.items()}, probes)
                for kind in sums:
                    sums[kind] += signs[kind] * (plus[kind] - minus[kind]) / (2 * PROBE)
                probes += 1
            self.curvature = {kind: (value / probes).mean().item() for kind, value in sums.items()}
            if all(value > 0 for value in self.curvature.values()):
                break
        for kind, scale in self.curvature.items():
            if not scale > 0:
                raise InputError(
                    f"the loss does not grow when the {kind} gates move away from 1 (curvature {scale:.2g}): give more "
                    "calibration text, or use a one-shot score (stade, obs)"
                )
            each = (sums[kind] / probes).clamp(min=1e-12)
            self.rates[kind] = RATE * (5 * scale / each).clamp(max=1.0)
            self.duals[kind] = torch.full(self.gates[kind].shape[:1], PRICE[self.schedule], device=each.device)
            self.removed[kind] = 0.0

    def bottom(self, kind: str) -> float:
        """How many units of a kind are priced in every block at this step, the last of them in part.

        Where a block has few units, releasing one at a stroke would settle which it is by the noise of that moment.
        """
        units = self.gates[kind].shape[1]
        if self.schedule == "paper":
            return math.ceil(units * self.removed[kind] - 1e-6)
        fall = min(max((self.step / self.steps - SORT) / (RAMP - SORT), 0.0), 1.0)
        return units - fall * self.keeps[kind] if self.keeps[kind] < units else 0

    def advance_(self, gradient: Mapping[str, Tensor], project: Project) -> None:
        """One step of the gates, and before the set is fixed, of the duals and the widths."""
        if not self.kept and self.step >= CHOOSE * self.steps:
            self._choose_(project)
        for kind, gates in self.gates.items():
            if self.keeps[kind] == gates.shape[1] and self.schedule == "from_above":
                continue  # all of them stay
            move = self.rates[kind] * gradient[kind] / self.curvature[kind]
            gates -= move.clamp(-LARGEST_STEP, LARGEST_STEP)
            if self.kept:
                gates *= self.kept[kind]
            else:
                self._price_(kind)
        if not self.kept and self.schedule == "paper":
            self.multiplier = max(0.0, self.multiplier + 10 / self.steps * (self.kept_share() - self.budget))
        self.step += 1

    def _price_(self, kind: str) -> None:
        """The proximal step on the smallest gates of every block, and the duals' step."""
        gates, duals, count = self.gates[kind], self.duals[kind], self.bottom(kind)
        if self.schedule == "paper":
            self._widen_(kind, count)
        if count == 0:
            return
        ranks = torch.arange(gates.shape[1], dtype=gates.dtype, device=gates.device)
        share = (count - ranks).clamp(0, 1).expand_as(gates)  # of the price, from the smallest gate on
        priced = torch.empty_like(gates).scatter_(1, self._strength(kind).argsort(dim=1, stable=True), share)
        gates /= 1 + 2 * self.rates[kind] * duals[:, None] * priced
        if self.schedule == "paper" or self.step >= SORT * self.steps:
            duals += PRICE_RATE[self.schedule] / self.steps * (priced * gates.square()).sum(1) / count

    def _widen_(self, kind: str, count: float) -> None:
        """Raise the share that goes while the budget's price exceeds that of one unit more."""
        units = self.gates[kind].shape[1]
        shares = self._shares()
        unit = sum(self.curvature[k] / shares[k] for k in shares) / len(shares)
        ordered = self.gates[kind].square().gather(1, self._strength(kind).argsort(dim=1, stable=True))
        cost = (self.duals[kind] * ordered[:, min(int(count), units - 1)]).mean().item()
        gain = self.multiplier - self.curvature[kind] * cost / (shares[kind] * unit)
        self.removed[kind] = min(max(self.removed[kind] + WIDTH_RATE * min(max(gain, -1.0), 1.0), 0.0), 1 - 1 / units)

    def _shares(self) -> dict[str, float]:
        """Of one unit of each kind in a block's units."""
        whole = sum(price * self.gates[kind].shape[1] for kind, price in self.prices.items())
        return {kind: price / whole for kind, price in self.prices.items()}

    def widths(self) -> dict[str, int]:
        """Units of each kind that are not priced at this step; once the set is fixed, those in it."""
        if self.kept:
            return self.keeps
        return {kind: gates.shape[1] - math.ceil(self.bottom(kind)) for kind, gates in self.gates.items()}

    def kept_share(self) -> float:
        """Share of the units' parameters that these hold."""
        shares, widths = self._shares(), self.widths()
        return sum(shares[kind] * widths[kind] for kind in shares)

    def _choose_(self, project: Project) -> None:
        """Fix the set: the largest gates of every block, as many as the budget allows."""
        if self.schedule == "paper":
            self.keeps = project({kind: 1 - share for kind, share in self.removed.items()})
        for kind, gone in self.pruned_set().items():
            self.kept[kind] = ~gone
            self.gates[kind] *= ~gone

    def pruned_set(self) -> dict[str, Tensor]:
        """bool [blocks, units] by kind: the weakest, as many as are to go in the end."""
        return {
            kind: torch.zeros_like(gates, dtype=torch.bool).scatter_(
                1, self._strength(kind).topk(gates.shape[1] - self.keeps[kind], dim=1, largest=False).indices, True
            )
            for kind, gates in self.gates.items()
        }

    def _strength(self, kind: str) -> Tensor:
        """[blocks, units]: what is to go is smallest."""
        return self.order[kind] if kind in self.order else self.gates[kind].square()
