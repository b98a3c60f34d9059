"""`llmprune plan`: all patterns and methods beside each other, and which to take."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from llmprune_eval.options import Debug, Dtype, Json, Length, Model, Remote

from llmprune.errors import InputError
from llmprune.options import Batch, Ignore, Samples, Targets
from llmprune.terminal import say

Goal = Annotated[str | None, typer.Option("--goal", help="smaller, faster or quality: recommend for this one only.")]
Share = Annotated[
    float | None,
    typer.Option("--sparsity", help="Share of the weights to prune [0.5]; uniform: of the decoder's parameters [0.2]."),
]


def plan_command(
    model: Model,
    goal: Goal = None,
    sparsity: Share = None,
    num_calibration_samples: Samples = 128,
    max_seq_length: Length = None,
    batch_size: Batch = 8,
    ignore: Ignore = None,
    targets: Targets = None,
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What each pattern and method would do to a model and need, from its config alone, and which to take."""
    from llmprune_eval.loading import empty_model

    from llmprune.advice import GOALS, make_advice
    from llmprune.advice_text import advice_text
    from llmprune.config import PruneConfig
    from llmprune.outlook import this_machine

    if goal is not None and goal not in GOALS:
        raise InputError(f"goal '{goal}' is unknown: choose from {', '.join(GOALS)}")
    config = PruneConfig(
        sparsity=sparsity,
        num_calibration_samples=num_calibration_samples,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        ignore=tuple(ignore or ()),
        targets=tuple(targets or ()),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    empty = empty_model(model, dtype, trust_remote_code)
    advice = make_advice(empty, model, config, this_machine(), [goal] if goal else tuple(GOALS))
    say(json.dumps(advice.as_dict(), indent=1) if as_json else advice_text(advice))
