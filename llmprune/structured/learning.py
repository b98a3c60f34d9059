"""The learning run of MaskPrune: windows in, gates out; it shows its progress, and survives being killed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llmprune.collectives import world
from llmprune.errors import InputError
from llmprune.structured.adapters import Adapters
from llmprune.structured.best import Best
from llmprune.structured.gates import Gates, Loss, gradients, mean_loss
from llmprune.structured.minimax import Minimax
from llmprune.structured.state import State
from llmprune.structured.task import Task

log = logging.getLogger(__name__)

OVERFLOWS = "(NaN or infinity): the model overflows in its dtype; try --dtype float32"
CHECKS = 20
"""Times in a run at which, once the set is fixed, the loss over all windows is taken: two forward passes each."""
SHOWN = 100
"""Rows of the curves, and times that the state is saved, in a run."""


def learn_gates(
    task: Task, gates: Gates, loss: Loss, order: Mapping[str, Tensor], adapters: Adapters | None = None
) -> Minimax:
    """Play the game to its end; `gates` hold the best state since the set was fixed, zero where a unit goes.

    Args:
        order: of the units that go in an order known beforehand (see `Minimax`).
        adapters: trained beside the gates.

    Raises:
        InputError: the loss is not finite, or a saved state belongs to another run.
    """
    game = _new_game(task, gates, order)
    state = State(task, game, adapters, Best())
    before: dict[str, Tensor] | None = None
    if task.resume and task.state is not None and task.state.is_file():
        state.load_(task.state)
        before = game.pruned_set()
        log.info("goes on at step %d of %d", game.step, game.steps)
    else:
        if task.resume:
            log.warning("nothing to resume: %s is not there; learning starts anew", task.state)
        game.probe_(partial(_gradient, task, gates, loss), _generator(task.seed))
    stride = max(1, game.steps // SHOWN)
    bar = tqdm(total=game.steps, initial=game.step, desc="learning masks", disable=world()[0] > 0 or None, leave=False)
    with bar:
        while game.step < game.steps:
            number = game.step
            gates.values = game.gates
            value, gradient, further = gradients(
                gates, loss, step_windows(task, number), task.batch_size, adapters.parameters if adapters else ()
            )
            if not _is_finite(value, gradient):
                state.save()
                raise InputError(
                    f"the loss of step {number + 1} is not finite {OVERFLOWS}; --resume goes on from the step before"
                )
            game.advance_(gradient, lambda shares: task.structure.fit(shares).kept)
            if adapters is not None:
                adapters.step(further)
            bar.update()
            if game.kept and (game.step % max(1, game.steps // CHECKS) == 0 or game.step == game.steps):
                gates.values = game.gates
                state.best.offer(mean_loss(gates, loss, task.windows, task.batch_size), state.learned())
            if number % stride == 0 or game.step == game.steps:
                row, before = _row(game, value, before)
                task.curves.append(row)
                bar.set_postfix(loss=f"{value:.4f}", budget=f"{row['kept_share']:.3f}", overlap=row["overlap"])
                state.save()
    state.return_to_best_()
    gates.values = game.gates
    return game


def _new_game(task: Task, gates: Gates, order: Mapping[str, Tensor]) -> Minimax:
    kinds = task.structure.kinds
    prices = {kind.site: kind.parameters for kind in kinds}
    whole = sum(kind.parameters * kind.units for kind in kinds)
    kept = sum(kind.parameters * gates.keeps[kind.site] for kind in kinds)
    options, budget = task.options, kept / whole
    return Minimax(gates.values, dict(gates.keeps), prices, options.schedule, options.steps, budget, order=order)


def _gradient(task: Task, gates: Gates, loss: Loss, values: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The gradient at given gates on the windows of a step."""
    gates.values = dict(values)
    value, gradient, _ = gradients(gates, loss, step_windows(task, number), task.batch_size)
    if not _is_finite(value, gradient):
        raise InputError(f"the loss of the model as it is is not finite {OVERFLOWS}")
    return gradient


def _is_finite(value: float, gradient: Mapping[str, Tensor]) -> bool:
    return math.isfinite(value) and all(bool(torch.isfinite(part).all()) for part in gradient.values())


def step_windows(task: Task, number: int) -> Tensor:
    """The windows [k, seqlen] of a step: from one shuffled round of all of them to the next."""
    count = len(task.windows)
    size = max(1, min(count, round(task.options.passes * count / task.options.steps)))
    first = number * size
    rows: list[int] = []
    for position in range(first, first + size):
        epoch, place = divmod(position, count)
        if not rows or place == 0:
            order = torch.randperm(count, generator=_generator(task.seed + 1 + epoch))
        rows.append(int(order[place]))
    return task.windows[rows]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _row(game: Minimax, loss: float, before: dict[str, Tensor] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the curves show of a step, and the set to compare the next one with."""
    gone = game.pruned_set()
    overlap = None
    if before is not None:
        same = sum(int((gone[kind] & before[kind]).sum()) for kind in gone)
        overlap = round(same / max(1, sum(int(value.sum()) for value in gone.values())), 4)
    row = {"step": game.step, "loss": loss, "kept_share": game.kept_share(), "budget": game.budget}
    return {**row, "overlap": overlap, "widths": dict(game.widths())}, gone
