"""Gates and what is asked through them, against models whose weights carry the gates, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, restored_state
from literal import Matrix, f64
from torch import Tensor
from transformers import PreTrainedModel
from unit_tables import UNITS

from llmprune.blocks import survey
from llmprune.config import LearningOptions
from llmprune.structured.distillation import Distillation
from llmprune.structured.gates import Gates, checkpointed, gradients
from llmprune.structured.learning import step_windows
from llmprune.structured.structure import make_structure

pytestmark = pytest.mark.usefixtures("one_thread")
GATED = ["llama", "gpt2", "phi3"]
"""Separate, transposed and fused projections; of gpt2 the channels alone."""


def gated(name: str) -> tuple[PreTrainedModel, list[Any], Gates]:
    """A model, its blocks and random gates on it."""
    model = FAMILIES[name].build()
    blocks = survey(model)
    make_structure(model, blocks, 0.2)
    gates = Gates(blocks, torch.device("cpu"))
    for path, value in gates.values.items():
        gates.values[path] = torch.rand_like(value) + 0.3
    return model, blocks, gates


def folded(name: str, model: PreTrainedModel, gates: Gates) -> PreTrainedModel:
    """A float64 copy whose output projections are multiplied by the gates, column by column."""
    exact = copy.deepcopy(model).double()
    for number, block in enumerate(exact.get_submodule(FAMILIES[name].blocks).children()):
        for site, units, columns, _ in UNITS[name]:
            weight = block.get_submodule(site).weight.data
            for column in range(units * columns) if site in gates.values else ():
                row = weight[column] if name == "gpt2" else weight[:, column]
                row.mul_(gates.values[site][number, column // columns].item())
    return exact


def seen(name: str, model: PreTrainedModel, windows: Tensor) -> tuple[Matrix, list[Matrix]]:
    """Log-probabilities [n, t, v] and what every block returns."""
    outputs: list[Matrix] = []

    def note(module: object, args: object, output: Tensor | Sequence[Tensor]) -> None:
        outputs.append(f64(output if isinstance(output, Tensor) else output[0]))

    hooks = [block.register_forward_hook(note) for block in model.get_submodule(FAMILIES[name].blocks).children()]
    with torch.no_grad():
        logits = f64(model(input_ids=windows, use_cache=False).logits)
    for hook in hooks:
        hook.remove()
    largest = logits.max(-1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True)), outputs


@pytest.mark.parametrize("name", GATED)
def test_gates_are_factors_on_the_units(name: str, windows: Tensor) -> None:
    model, _, gates = gated(name)
    before = restored_state(model)
    exact, dense = (seen(name, m, windows)[0] for m in (folded(name, model, gates), model))
    with gates.applied():
        found = seen(name, model, windows)[0]
        with gates.opened():
            assert np.array_equal(seen(name, model, windows)[0], dense)
    assert np.abs(found - exact).max() < 1e-3 < np.abs(dense - exact).max()
    assert restored_state(model) == before
    assert np.array_equal(seen(name, model, windows)[0], dense)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.3, 0.0)])
@pytest.mark.parametrize("name", GATED)
def test_the_loss_is_that_of_the_formula(name: str, weights: tuple[float, float, float], windows: Tensor) -> None:
    model, _, gates = gated(name)
    p, wanted = seen(name, copy.deepcopy(model).double(), windows)
    q, states = seen(name, folded(name, model, gates), windows)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    ce = -np.mean([[q[n, t, windows[n, t + 1]] for t in range(23)] for n in range(11)])
    hidden = sum(np.mean((a - b) ** 2) for a, b in zip(states, wanted, strict=True))
    with gates.applied():
        found = Distillation(model, gates, *weights)(windows).item()
    assert found == pytest.approx(weights[0] * kl + weights[1] * ce + weights[2] * hidden, rel=1e-3)


@pytest.mark.parametrize("name", GATED)
def test_batches_and_checkpointing_change_neither_loss_nor_gradient(name: str, windows: Tensor) -> None:
    model, blocks, gates = gated(name)
    model.requires_grad_(False)
    loss = Distillation(model, gates, 1.0, 0.5, 0.1)
    whole = gradients(gates, loss, windows, 11)
    before = restored_state(model)
    with checkpointed(blocks):
        other = gradients(gates, loss, windows, 11)
    assert restored_state(model) == before
    for value, slopes in ((other[0], other[1]), gradients(gates, loss, windows, 4)[:2]):
        assert value == pytest.approx(whole[0], rel=1e-4)
        for path, expected in whole[1].items():
            assert (slopes[path] - expected).norm() < 1e-3 * expected.norm()


def test_with_open_gates_there_is_nothing_to_gain(windows: Tensor) -> None:
    model, _, gates = gated("llama")
    for value in gates.values.values():
        value.fill_(1.0)
    loss, slopes = gradients(gates, Distillation(model, gates), windows, 4)[:2]
    assert abs(loss) < 1e-5
    assert all(slope.abs().max() < 1e-4 for slope in slopes.values())


@pytest.mark.parametrize(("steps", "passes"), [(30, 10), (400, 40), (11, 40), (500, 1)])
def test_every_window_is_seen_once_a_round(steps: int, passes: int) -> None:
    windows = torch.arange(12).view(12, 1)
    task: Any = SimpleNamespace(windows=windows, seed=0, options=LearningOptions(steps=steps, passes=passes))
    parts = [step_windows(task, number).flatten().tolist() for number in range(steps)]
    size = min(12, max(1, round(passes * 12 / steps)))
    assert {len(part) for part in parts} == {size}
    drawn = [window for part in parts for window in part]
    rounds = [drawn[start : start + 12] for start in range(0, len(drawn) - 11, 12)]
    assert all(sorted(each) == list(range(12)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
