"""Wanda by brute force, the oracle of the walk.

It shares no idea with the walk: for every block, and for every window on its own, the whole model runs; in
site order it does so for every single site. Nothing is captured, replayed, held or cut short, sums are plain
sums in float64, and what an expert sees is worked out from its router's decisions and its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from families import Family
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

FEW_TOKENS = 32
FUSED = ("gate_up_proj", "down_proj")
"""The parameters that hold one matrix per expert, in the order of use."""
Statistics = dict[str, tuple[int, Tensor, Tensor, Tensor]]
"""What Wanda was given, by site: count, mean, variance, energy."""
NEAR_TIE = 1e-4
"""Relative distance from the threshold below which float32 and float64 may choose differently."""


@dataclass
class Tally:
    """Sums over rows."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.count

    @property
    def energy(self) -> Tensor:
        return torch.as_tensor(self.squares) / self.count

    @property
    def variance(self) -> Tensor:
        return (torch.as_tensor(self.squares) - self.count * self.mean.square()) / (self.count - 1)


@dataclass
class Slot:
    """A weight matrix to be pruned: its view as [out, in], and what its inputs were."""

    weight: Tensor
    tally: Tally = field(default_factory=Tally)
    own_tokens: int = 0
    keep: Tensor = field(default_factory=lambda: torch.empty(0))
    near_ties: int = 0


def slots_of(model: PreTrainedModel, family: Family) -> list[dict[str, Slot]]:
    """For every block, its matrices by their full names."""
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    found = []
    for number, block in enumerate(blocks):
        slots: dict[str, Slot] = {}
        for path, module in block.named_modules():
            name = f"{family.blocks}.{number}.{path}"
            if path.split(".")[-1] in family.unpruned:
                continue
            if isinstance(module, (nn.Linear, Conv1D)):
                slots[name] = Slot(module.weight.data.T if isinstance(module, Conv1D) else module.weight.data)
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    for expert, weight in enumerate(parameter.data):
                        slots[f"{name}.{key}.{expert}"] = Slot(weight.T if family.experts_transposed else weight)
        found.append(slots)
    return found


def prune_by_hand(
    model: PreTrainedModel,
    family: Family,
    windows: Tensor,
    chosen: Callable[[str], Tensor],
    sequential: str = "block",
) -> dict[str, Slot]:
    """Prune half of every row, block after block, or also site after site, in place.

    Where a score lies next to the threshold the mask `chosen` [out, in] is followed: rounding decides such
    cases, and from then on two walks that decide differently would see different activations.
    """
    everything: dict[str, Slot] = {}
    for number, slots in enumerate(slots_of(model, family)):
        block = model.get_submodule(f"{family.blocks}.{number}")
        together = [list(slots)] if sequential == "block" else in_order_of_calls(model, block, slots, family, number)
        for names in together:
            step = {name: slots[name] for name in names}
            for some in windows.split(1 if sequential == "block" else len(windows)):
                with _watching(block, step, family, number):
                    model(input_ids=some)
            _share_among_few(step)
            for name, slot in step.items():
                _prune_half(slot, chosen(name))
            everything |= step
    return everything


def in_order_of_calls(
    model: PreTrainedModel, block: nn.Module, slots: dict[str, Slot], family: Family, number: int
) -> list[list[str]]:
    """One matrix after the other as they are first called; the experts of a fused parameter are one step."""
    order: list[str] = []
    handles = []
    for path, module in block.named_modules():
        name = f"{family.blocks}.{number}.{path}"
        parts = [name] if name in slots else [f"{name}.{key}" for key in FUSED if f"{name}.{key}.0" in slots]

        def called(module: nn.Module, args: object, parts: list[str] = parts) -> None:
            order.extend(part for part in parts if part not in order)

        handles.append(module.register_forward_pre_hook(called))
    model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    for handle in handles:
        handle.remove()
    return [[name for name in slots if part in (name, name.rpartition(".")[0])] for part in order]


def _prune_half(slot: Slot, chosen: Tensor) -> None:
    scores = slot.weight.double().abs() * slot.tally.energy.sqrt()
    width = scores.shape[1]
    order = scores.sort(dim=1, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order.indices[:, : width // 2], False)
    threshold = order.values[:, width // 2 - 1 : width // 2]
    free = (scores - threshold).abs() <= NEAR_TIE * threshold
    slot.near_ties = int((keep != chosen)[free].sum())
    slot.keep = torch.where(free, chosen, keep)
    slot.weight[~slot.keep] = 0.0


class _watching:  # noqa: N801 - used as a context manager only
    """Plain hooks on a block's linear maps and expert modules."""

    def __init__(self, block: nn.Module, slots: dict[str, Slot], family: Family, number: int) -> None:
        self._handles = list(_hooks(block, slots, family, number))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _hooks(
    block: nn.Module, slots: dict[str, Slot], family: Family, number: int
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    for path, module in block.named_modules():
        name = f"{family.blocks}.{number}.{path}"
        if name in slots:

            def linear(module: nn.Module, args: tuple[Tensor, ...], tally: Tally = slots[name].tally) -> None:
                tally.add(args[0].double().flatten(0, -2))

            yield module.register_forward_pre_hook(linear)
        elif any(f"{name}.{key}.0" in slots for key in FUSED):

            def experts(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                _route(module, name, slots, family, *args)

            yield module.register_forward_pre_hook(experts)


def _route(
    module: Any, name: str, slots: dict[str, Slot], family: Family, x: Tensor, index: Tensor, weights: Tensor
) -> None:
    """What enters an expert: the tokens that chose it; what enters its second product follows by the formula."""
    for expert, stored in enumerate(module.gate_up_proj.data.double()):
        rows = x[(index == expert).any(-1)].double()
        product = rows @ (stored if family.experts_transposed else stored.T)
        if hasattr(module, "gate_up_proj_bias"):
            product = product + module.gate_up_proj_bias[expert].double()
        assert family.gate is not None
        for key, entering in zip(FUSED, (rows, family.gate(product)), strict=True):
            if (slot := slots.get(f"{name}.{key}.{expert}")) is not None:
                slot.tally.add(entering)


def _share_among_few(slots: dict[str, Slot]) -> None:
    """Experts with few tokens are judged by all tokens of all experts of their parameter."""
    totals: dict[str, Tally] = {}
    for name, slot in slots.items():
        slot.own_tokens = slot.tally.count
        stem, _, last = name.rpartition(".")
        if last.isdigit():
            total = totals.setdefault(stem, Tally())
            total.count += slot.tally.count
            total.total = total.total + slot.tally.total
            total.squares = total.squares + slot.tally.squares
    for name, slot in slots.items():
        if slot.own_tokens < FEW_TOKENS and name.rpartition(".")[0] in totals:
            slot.tally = totals[name.rpartition(".")[0]]


def all_slots(model: PreTrainedModel, family: Family) -> dict[str, Slot]:
    return {name: slot for slots in slots_of(model, family) for name, slot in slots.items()}


def check_against_brute_force(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    family: Family,
    windows: Tensor,
    statistics: Statistics,
    sequential: str = "block",
) -> dict[str, Slot]:
    """Prunes `dense` by hand and compares statistics, masks, weights and logits; returns the oracle's findings."""
    theirs = all_slots(pruned, family)
    with torch.no_grad():
        slots = prune_by_hand(dense, family, windows, lambda name: theirs[name].weight != 0, sequential)
    assert list(slots) and set(slots) == set(statistics)
    for name, slot in slots.items():
        count, mean, variance, energy = (torch.as_tensor(value).double() for value in statistics[name])
        assert count == slot.tally.count, name
        scale = float(slot.tally.energy.max())
        assert torch.allclose(mean, slot.tally.mean, rtol=1e-4, atol=1e-5 * scale**0.5), name
        assert torch.allclose(variance, slot.tally.variance, rtol=1e-4, atol=1e-6 * scale), name
        assert torch.allclose(energy, slot.tally.energy, rtol=1e-4, atol=1e-6 * scale), name
        assert torch.equal(theirs[name].weight != 0, slot.keep), name
        assert torch.equal(theirs[name].weight, slot.weight), name
    assert sum(slot.near_ties for slot in slots.values()) <= 2
    with torch.no_grad():
        torch.testing.assert_close(pruned(input_ids=windows).logits, dense(input_ids=windows).logits)
    return slots


def keep_by_size(weight: Tensor) -> Tensor:
    threshold = weight.abs().kthvalue(weight.shape[1] // 2, dim=1, keepdim=True).values
    return weight.abs() > threshold
