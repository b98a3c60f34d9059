"""`llmprune prune`: every option a field of the config."""

from __future__ import annotations

from llmprune_eval.options import Debug, Device, Dtype, Json, Length, Model, Remote

from llmprune.errors import InputError
from llmprune.options import (
    Batch,
    Calibration,
    Ce,
    Checkpointing,
    Compensation,
    DryRun,
    Hidden,
    Holdout,
    Ignore,
    KeepHeads,
    Kl,
    LoraRank,
    Method,
    Mix,
    Output,
    Overwrite,
    Passes,
    PatternName,
    Refine,
    Residual,
    Resume,
    RoundChannels,
    Samples,
    Schedule,
    Seed,
    Sequential,
    Sparsity,
    Steps,
    Target,
    Targets,
)
from llmprune.terminal import say


def prune_command(
    model: Model,
    output: Output = None,
    method: Method = "wanda",
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    refine: Refine = None,
    compensation: Compensation = None,
    sequential: Sequential = None,
    target: Target = None,
    mix: Mix = None,
    residual: Residual = None,
    dataset: Calibration = None,
    num_calibration_samples: Samples = 128,
    num_holdout_samples: Holdout = 8,
    max_seq_length: Length = None,
    batch_size: Batch = 8,
    seed: Seed = 0,
    keep_heads: KeepHeads = False,
    round_channels: RoundChannels = 1,
    steps: Steps = 400,
    passes: Passes = 40,
    schedule: Schedule = "from_above",
    kl: Kl = 1.0,
    ce: Ce = 0.0,
    hidden: Hidden = 0.0,
    lora_rank: LoraRank = 0,
    checkpointing: Checkpointing = False,
    resume: Resume = False,
    ignore: Ignore = None,
    targets: Targets = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune a model and save it so that it reloads anywhere."""
    from llmprune.commands import run_prune, show_plan
    from llmprune.config import PruneConfig
    from llmprune.structured.task import LearningOptions

    config = PruneConfig(
        method=method,
        sparsity=sparsity,
        pattern=pattern,
        refine=refine,
        compensation=compensation,
        sequential=sequential,
        target=target,
        mix=mix,
        residual=residual,
        dataset=dataset,
        num_calibration_samples=num_calibration_samples,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        seed=seed,
        learning=LearningOptions(steps, passes, schedule, kl, ce, hidden, lora_rank, checkpointing),
        keep_heads=keep_heads,
        round_channels=round_channels,
        ignore=tuple(ignore or ()),
        targets=tuple(targets or ()),
        device=device,
        dtype=dtype,
        num_holdout_samples=num_holdout_samples,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        say(show_plan(model, config, as_json))
    elif output is None:
        raise InputError("no output folder: pass -o FOLDER, or --dry-run to see what would be done")
    else:
        say(run_prune(model, output, config, overwrite, resume, as_json))
