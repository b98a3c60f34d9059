"""The options of the command line, one type each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path | None, typer.Option("-o", "--output", "--save_model", help="Folder for the pruned model.")]
Method = Annotated[str, typer.Option("--method", "--prune_method", help="See `llmprune methods`.")]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "--sparsity_ratio",
        help="Share of the weights to prune [0.5]; uniform: of the decoder's parameters [0.2].",
    ),
]
PatternName = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        "--sparsity_type",
        help="unstructured, row, matrix, n:m (n of m KEPT), or uniform: a smaller model [the method's own].",
    ),
]
KeepHeads = Annotated[bool, typer.Option("--keep-heads", help="With --pattern uniform: leave attention alone.")]
RoundChannels = Annotated[
    int, typer.Option("--round-channels", help="With --pattern uniform: the FFN's width becomes a multiple of it.")
]
Refine = Annotated[
    str | None,
    typer.Option("--refine", help="none, or swap: exchange kept and pruned weights of a row [the method's own]."),
]
Compensation = Annotated[
    str | None,
    typer.Option("--compensation", help="none, bias, or least-squares: what survives is moved [the method's own]."),
]
Sequential = Annotated[
    str | None,
    typer.Option("--sequential", help="block, or site: measure each behind the pruned ones [the method's own]."),
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="own, or dense: approximate the dense model's output [the method's own]."),
]
Mix = Annotated[
    float | None,
    typer.Option("--mix", help="With --target dense: how much of it, from 0 to 1; the rest is own [0.75]."),
]
Residual = Annotated[
    float | None,
    typer.Option("--residual", help="With --target dense: share of the residual stream's error to cancel [1.0]."),
]
Steps = Annotated[int, typer.Option("--steps", help="maskprune: steps of learning.")]
Passes = Annotated[int, typer.Option("--passes", help="maskprune: how often every window is seen.")]
Schedule = Annotated[
    str, typer.Option("--schedule", help="maskprune: from_above (widths given), or paper (widths learned).")
]
Kl = Annotated[float, typer.Option("--kl", help="maskprune: weight of the divergence from the dense model.")]
Ce = Annotated[float, typer.Option("--ce", help="maskprune: weight of the cross-entropy.")]
Hidden = Annotated[float, typer.Option("--hidden-mse", help="maskprune: weight of the hidden states' squared error.")]
LoraRank = Annotated[int, typer.Option("--lora-rank", help="maskprune: rank of adapters trained along; 0 for none.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="maskprune: run blocks twice instead of keeping what is inside them.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the learning of a run that was interrupted.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Calibration text: FILE (.txt .jsonl .parquet), windows (.npy), c4, wikitext2, owner/name, c4:FILE, "
        "wikitext2:FILE, or self (the model writes it).",
    ),
]
Samples = Annotated[int, typer.Option("--num-calibration-samples", "--nsamples", help="Token windows.")]
Holdout = Annotated[int, typer.Option("--num-holdout-samples", help="Windows kept aside to measure the loss on.")]
Seed = Annotated[int, typer.Option("--seed", help="For the choice of windows and random pruning.")]
Ignore = Annotated[
    list[str] | None, typer.Option("--ignore", help="Leave alone: part of a name, class, re:EXPRESSION.")
]
Targets = Annotated[list[str] | None, typer.Option("--targets", help="Prune only these.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and touch nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Windows per forward pass, at most.")]
