"""Which pattern and method to take for which goal, with the command to type, before a weight is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.blocks import Skipped
from llmprune.command_line import shell_command
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    further = _further(goal, outlooks["2:4"])
    if outlooks[pattern].problem:
        return Recommendation(goal, None, f"pattern {pattern}, which serves this goal, is impossible here{further}")
    order = BEST_UNITS if pattern == "uniform" else BEST_ZEROS
    rows = [row for row in needs if row.pattern == pattern and row.method in order]
    candidates = [row for row in rows if row.passes]  # without data too much is lost
    row = next((row for row in candidates if row.verdict != "does not fit"), candidates[0])
    gain = {
        "smaller": f"the file shrinks to {outlooks[pattern].size / outlooks['unstructured'].size:.0%}",
        "faster": f"up to {outlooks[pattern].speedup:.2f}x is to be expected, in any runtime",
        "quality": "zeros wherever they cost least; size and speed stay as they are",
    }[goal]
    loss = f"{row.method} loses least of all that was measured on small models"
    if row is not candidates[0]:
        loss = f"{row.method} loses least of what fits into memory here"
    elif row.verdict == "does not fit":
        fewer = any(other.verdict != "does not fit" for other in rows)  # those without data need the weights alone
        remedy = "give fewer windows or take a larger machine" if fewer else "take a larger machine"
        loss += f", but does not fit into memory here: {remedy}"
    command = _command(name, pattern, variants(order)[row.method], config)
    return Recommendation(goal, command, f"{gain}; {loss}{further}")


def _further(goal: str, pairs: Outlook) -> str:
    """What 2:4 can do for size and speed, if it is possible."""
    if pairs.packed is None or pairs.packed_speedup is None or goal == "quality":
        return ""
    shrinks = f"; 2:4, once `llmprune pack` has packed it, shrinks the file to {pairs.packed / pairs.size:.0%}"
    if goal == "smaller":
        return f"{shrinks}, for transformers with llmprune"
    return f"{shrinks} and decodes at most {pairs.packed_speedup:.2f}x as fast, on an NVIDIA GPU of Ampere or later"


def _command(name: str, pattern: str, options: Mapping[str, str], config: PruneConfig) -> str:
    """The line to type, with whatever is not the default; with C4 where a method needs text."""
    chosen = configured(config, pattern, options)
    output = f"{Path(name).resolve().name}-{pattern}-{chosen.make_pattern().sparsity:g}"
    own = criterion(chosen.method).pattern == pattern
    needs = bool(chosen.make_recipe().needs)
    chosen = replace(chosen, pattern=None if own else pattern, dataset="c4" if needs else None)
    return shell_command(chosen, name, output)
