"""The file that a learning run which was cut short goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from llmprune_eval.ready_windows import digest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.collectives import world
from llmprune.errors import InputError
from llmprune.structured.adapters import Adapters
from llmprune.structured.best import Best
from llmprune.structured.minimax import Minimax
from llmprune.structured.task import Task

TABLES = ("gates", "rates", "duals", "kept")
SCALARS = ("keeps", "curvature", "removed", "multiplier", "step")
"""What of a game is saved, by attribute: tensors by kind of unit, and what JSON can hold."""


@dataclass
class State:
    """A run as far as it has come.

    Attributes:
        best: what it has passed through since its set was fixed.
    """

    task: Task
    game: Minimax
    adapters: Adapters | None
    best: Best

    @cached_property
    def _identity(self) -> str:
        """What a saved state must have in common with a run that goes on from it."""
        task = self.task
        facts = {
            **asdict(task.options),
            "seed": task.seed,
            "windows": digest(task.windows),
            "weights": [site.weight.double().sum().item() for block in task.blocks for site in block.sites],
            "kept": task.structure.widths.kept,
            "batch": task.batch_size,
        }
        return json.dumps(facts, sort_keys=True)

    def learned(self) -> dict[str, Tensor]:
        """What the run would hand on now."""
        adapters = self.adapters.tensors() if self.adapters is not None else {}
        return {**_named("gates", self.game.gates), **_named("adapters", adapters)}

    def return_to_best_(self) -> None:
        """Go back to the best of what was learned."""
        self.game.gates = _under("gates", self.best.tensors)
        if self.adapters is not None:
            self.adapters.load_(_under("adapters", self.best.tensors))

    def save(self) -> None:
        """Write everything beside the output, at once or not at all."""
        path = self.task.state
        if path is None or world()[0] > 0:
            return
        tensors = {**self.learned(), **_named("best", self.best.tensors)}
        for table in TABLES:
            tensors |= _named(table, getattr(self.game, table))
        scalars = {name: getattr(self.game, name) for name in SCALARS} | {"best": self.best.loss}
        building = path.with_suffix(".building")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.cpu().contiguous() for name, value in tensors.items()},
            building,
            metadata={
                "identity": self._identity,
                "scalars": json.dumps(scalars),
                "curves": json.dumps(self.task.curves),
            },
        )
        building.replace(path)

    def load_(self, path: Path) -> None:
        """Go back to what was saved.

        Raises:
            InputError: it is damaged, or of a run with other settings.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
            found = load_file(path)
            scalars, curves = json.loads(facts["scalars"]), json.loads(facts["curves"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it and learn anew, without --resume") from error
        if facts.get("identity") != self._identity:
            raise InputError(f"{path} was left by a run with other settings: repeat them, or leave --resume out")
        place: torch.device = next(iter(self.game.gates.values())).device
        tensors = {name: value.to(place) for name, value in found.items()}
        for table in TABLES:
            setattr(self.game, table, _under(table, tensors))
        self.best.loss, self.best.tensors = scalars.pop("best"), _under("best", tensors)
        for name, value in scalars.items():
            setattr(self.game, name, value)
        self.task.curves[:] = curves
        if self.adapters is not None:
            self.adapters.load_(_under("adapters", tensors))


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one part under names of its own."""
    return {f"{part}/{name}": value for name, value in tensors.items()}


def _under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, by the names they had."""
    return {n.removeprefix(f"{part}/"): value for n, value in tensors.items() if n.startswith(f"{part}/")}
