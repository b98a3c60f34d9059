"""Which pattern and method to take for which goal, with the command to type, before a weight is touched."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune.blocks import Skipped
from llmprune.config import PruneConfig
from llmprune.criteria import criterion
from llmprune.outlook import (
    BEST_UNITS,
    BEST_ZEROS,
    PATTERNS,
    PROBED,
    Machine,
    Needs,
    Outlook,
    all_needs,
    configured,
    outlook,
    variants,
)
from llmprune.planning import WEIGHTS, make_plan

GOALS = {"smaller": "uniform", "faster": "uniform", "quality": "unstructured"}
"""What a user may want, and the pattern that gives it."""


@dataclass(frozen=True)
class Recommendation:
    """What to do for a goal: a command, or None if nothing serves it, and why."""

    goal: str
    command: str | None
    why: str


@dataclass(frozen=True)
class Advice:
    """All that can be said before a weight is touched; `skipped` holds for zeros, `widths` for units."""

    model: str
    architecture: str
    dtype: str
    blocks: int
    model_parameters: int
    decoder_parameters: int
    size: int
    windows: int
    seqlen: int
    machine: Machine
    skipped: list[Skipped]
    patterns: list[Outlook]
    methods: list[Needs]
    recommendations: list[Recommendation]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def make_advice(
    model: PreTrainedModel, name: str, config: PruneConfig, machine: Machine, goals: Sequence[str] = tuple(GOALS)
) -> Advice:
    """Plan every pattern and method for a model (on any device, also meta), and recommend.

    Args:
        name: of the model, for the commands.
        config: what all runs have in common: data, windows, targets; its method and pattern have no say.

    Raises:
        InputError: no zeros can be made at all, as `make_plan` says.
    """
    dense = make_plan(model, configured(config, "unstructured", {"method": "magnitude"}))
    probe = max(block.parameters for block in dense.blocks) <= PROBED
    outlooks = {pattern: outlook(model, config, pattern, probe=probe) for pattern in PATTERNS}
    needs = all_needs(model, config, machine, {pattern for pattern, one in outlooks.items() if not one.problem})
    return Advice(
        model=name,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        blocks=len(dense.blocks),
        model_parameters=dense.model_parameters,
        decoder_parameters=dense.decoder_parameters,
        size=dense.memory[WEIGHTS],
        windows=config.num_calibration_samples,
        seqlen=dense.seqlen,
        machine=machine,
        skipped=dense.skipped,
        patterns=list(outlooks.values()),
        methods=needs,
        recommendations=[_recommend(goal, name, config, outlooks, needs) for goal in goals],
    )


def _recommend(
    goal: str, name: str, config: PruneConfig, outlooks: Mapping[str, Outlook], needs: Sequence[Needs]
) -> Recommendation:
    """The best method, by measured quality, that fits into memory; the best of all if none does."""
    pattern = GOALS[goal]
    expected = outlooks[pattern]
    if expected.problem:
        return Recommendation(goal, None, f"only smaller widths serve this goal, and {expected.problem}")
    total = outlooks[GOALS["quality"]].size  # zeros change nothing about it
    order = BEST_UNITS if pattern == "uniform" else BEST_ZEROS
    rows = [row for row in needs if row.pattern == pattern and row.method in order and row.method != "random"]
    row = next((row for row in rows if row.verdict != "does not fit"), rows[0])
    why = {
        "smaller": f"the file shrinks to {expected.size / total:.0%}; {row.method} loses",
        "faster": f"up to {expected.speedup:.2f}x on any device and runtime; {row.method} loses",
        "quality": f"zeros wherever they cost least; size and speed stay as they are; {row.method} loses",
    }[goal]
    why += (
        " least of all that was measured" if row is rows[0] else f" least of what fits here ({rows[0].method} does not)"
    )
    if row.verdict == "does not fit":
        why += "; it does not fit into this machine's memory: give fewer windows, or take a larger machine"
    return Recommendation(goal, _command(name, pattern, variants(order)[row.method], config), why)


def _command(name: str, pattern: str, options: Mapping[str, str], config: PruneConfig) -> str:
    """The line to type, with whatever of the common options is not the default."""
    chosen = configured(config, pattern, options)
    suffix = "-".join([pattern, f"{chosen.make_pattern().sparsity:g}"])
    words = ["llmprune", "prune", name, "-o", f"{Path(name).resolve().name}-{suffix}"]
    words += [word for option, value in options.items() for word in (f"--{option}", value)]
    words += ["--pattern", pattern] * (pattern != criterion(options["method"]).pattern)
    words += [] if chosen.sparsity is None else ["--sparsity", f"{chosen.sparsity:g}"]
    words += ["--dataset", "c4"] * bool(chosen.make_recipe().needs)
    plain = PruneConfig()
    for option in ("num_calibration_samples", "max_seq_length", "batch_size", "dtype"):
        if (value := getattr(config, option)) != getattr(plain, option):
            words += [f"--{option.replace('_', '-')}", str(value)]
    for option in ("ignore", "targets"):
        words += [word for value in getattr(config, option) for word in (f"--{option}", value)]
    return shlex.join([*words, *["--trust-remote-code"] * config.trust_remote_code])
