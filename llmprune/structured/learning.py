"""The learning run of MaskPrune: windows in, gates out; it shows its progress, and survives being killed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from llmprune.collectives import world
from llmprune.errors import InputError
from llmprune.structured.adapters import Adapters
from llmprune.structured.best import Best
from llmprune.structured.gates import Gates, Loss, gradients, mean_loss
from llmprune.structured.minimax import Minimax
from llmprune.structured.task import Task

log = logging.getLogger(__name__)

OVERFLOWS = "(NaN or infinity): the model overflows in its dtype; try --dtype float32"
CHECKS = 20
"""Times in a run at which, once the set is fixed, the loss over all windows is taken: two forward passes each."""
SHOWN = 100
"""Rows of the curves, and times that the state is saved, in a run."""


def learn_gates(task: Task, gates: Gates, loss: Loss, adapters: Adapters | None = None) -> Minimax:
    """Play the game to its end; `gates` hold the best state since the set was fixed, zero where a unit goes.

    Args:
        adapters: trained beside the gates.

    Raises:
        InputError: the loss is not finite, or a saved state belongs to another run.
    """
    game, best = _new_game(task, gates), Best()
    before: dict[str, Tensor] | None = None
    if task.resume and task.state is not None and task.state.is_file():
        _load_(game, task, task.state, adapters, best)
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
                _save(game, task, adapters, best)
                raise InputError(
                    f"the loss of step {number + 1} is not finite {OVERFLOWS}; --resume goes on from the step before"
                )
            game.advance_(gradient, lambda shares: task.structure.fit(shares).kept)
            if adapters is not None:
                adapters.step(further)
            bar.update()
            if game.kept and (game.step % max(1, game.steps // CHECKS) == 0 or game.step == game.steps):
                gates.values = game.gates
                best.offer(mean_loss(gates, loss, task.windows, task.batch_size), _learned(game, adapters))
            if number % stride == 0 or game.step == game.steps:
                row, before = _row(game, value, before)
                task.curves.append(row)
                bar.set_postfix(loss=f"{value:.4f}", budget=f"{row['kept_share']:.3f}", overlap=row["overlap"])
                _save(game, task, adapters, best)
    gates.values = game.gates = best.under("gates/")
    if adapters is not None:
        adapters.load_(best.under("adapters/"))
    return game


def _learned(game: Minimax, adapters: Adapters | None) -> dict[str, Tensor]:
    """What a run hands on."""
    found = {f"gates/{kind}": value for kind, value in game.gates.items()}
    return found | {f"adapters/{name}": value for name, value in (adapters.tensors() if adapters else {}).items()}


def _new_game(task: Task, gates: Gates) -> Minimax:
    kinds = task.structure.kinds
    prices = {kind.site: kind.parameters for kind in kinds}
    whole = sum(kind.parameters * kind.units for kind in kinds)
    kept = sum(kind.parameters * gates.keeps[kind.site] for kind in kinds)
    return Minimax(gates.values, dict(gates.keeps), prices, task.options.schedule, task.options.steps, kept / whole)


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


def _identity(task: Task) -> str:
    """What a saved state must have in common with a run that goes on from it."""
    facts = {
        **asdict(task.options),
        "seed": task.seed,
        "windows": hashlib.sha256(task.windows.numpy().tobytes()).hexdigest(),
        "weights": [site.weight.double().sum().item() for block in task.blocks for site in block.sites],
        "kept": task.structure.widths.kept,
        "batch": task.batch_size,
    }
    return json.dumps(facts, sort_keys=True)


def _save(game: Minimax, task: Task, adapters: Adapters | None, best: Best) -> None:
    """Write the whole state beside the output, at once or not at all."""
    if task.state is None or world()[0] > 0:
        return
    tensors = {f"{name}/{kind}": value for name in ("rates", "duals", "kept")
               for kind, value in getattr(game, name).items()}  # fmt: skip
    tensors |= _learned(game, adapters) | {f"best/{name}": value for name, value in best.tensors.items()}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    scalars = {name: getattr(game, name) for name in ("keeps", "curvature", "removed", "multiplier", "step")}
    scalars["best"] = best.loss
    building = task.state.with_suffix(".building")
    task.state.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, building, metadata={"identity": _identity(task), "scalars": json.dumps(scalars),
                                           "curves": json.dumps(task.curves)})  # fmt: skip
    building.replace(task.state)


def _load_(game: Minimax, task: Task, path: Path, adapters: Adapters | None, best: Best) -> None:
    """Go back to a saved state.

    Raises:
        InputError: it is damaged, or of a run with other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        tensors = load_file(path)
        scalars, curves = json.loads(facts["scalars"]), json.loads(facts["curves"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it and learn anew, without --resume") from error
    if facts.get("identity") != _identity(task):
        raise InputError(f"{path} was left by a run with other settings: repeat them, or leave --resume out")
    place = next(iter(game.gates.values())).device
    for name in ("gates", "rates", "duals", "kept"):
        own = {key: value.to(place) for key, value in tensors.items() if key.startswith(f"{name}/")}
        setattr(game, name, {key.removeprefix(f"{name}/"): value for key, value in own.items()})
    best.loss = scalars.pop("best")
    best.tensors = {k.removeprefix("best/"): value.to(place) for k, value in tensors.items() if k.startswith("best/")}
    for name, value in scalars.items():
        setattr(game, name, value)
    task.curves[:] = curves
    if adapters is not None:
        adapters.load_({key.removeprefix("adapters/"): v for key, v in tensors.items() if key.startswith("adapters/")})
