"""The one description of a pruning run, shared by the API, the command line and the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmprune_eval.devices import check_device
from llmprune_eval.loading import check_dtype

from llmprune.criteria import COMPENSATIONS, criterion
from llmprune.errors import InputError
from llmprune.orders import IN_ORDER
from llmprune.patterns import RunPattern, Uniform, parse_pattern
from llmprune.recipe import REFINEMENTS, Recipe
from llmprune.structured.task import LearningOptions
from llmprune.targets import TARGETS


@dataclass(frozen=True)
class PruneConfig:
    """What to prune, by which method, on which data.

    Attributes:
        method: name of a criterion (`llmprune methods` lists them).
        sparsity: share of every site's weights to prune, in (0, 1), or with "uniform" of the decoder's parameters;
            None means 0.5 (uniform 0.2), or what n:m implies.
        pattern: "unstructured" (the method's own grouping), "row", "matrix", "n:m": n of m are KEPT, or "uniform":
            whole units, as many in every block, are cut out; None means the method's own.
        refine: "none", or "swap": exchange kept and pruned weights of a row while the output error falls. For this
            and the next five, None means the method's own.
        compensation: "none", "bias" (the mean of what is pruned goes there), or "least-squares" (that, and the best
            weights on the mask).
        sequential: "block" (all sites of a block measured while it is dense) or "site" (each measured with those
            before it pruned).
        target: "own" (the site's dense output on what it now receives) or "dense" (the dense model's output).
        mix: in [0, 1], how much of a dense target is the dense model's; the rest is the site's own.
        residual: in [0, 1], how much of the residual stream's error a dense target carries.
        dataset: FILE (.txt, .jsonl, .parquet, .npy), a Hub name, "c4", "wikitext2" or "self"; None if token
            windows are given directly or the method needs no data.
        num_calibration_samples: number of token windows.
        max_seq_length: tokens per window; None means min(2048, the model's positions).
        batch_size: windows per forward pass; a CPU takes fewer where they exceed 1024 tokens together.
        seed: for the choice of windows and for random pruning.
        learning: how maskprune learns its masks.
        keep_heads: with "uniform", leave attention alone.
        round_channels: with "uniform", the FFN's width becomes a multiple of it.
        ignore: patterns of what to leave alone (dotted part of a name, class name, "re:EXPRESSION").
        targets: patterns of what to prune; empty means every site.
        device: where the block at work computes: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: in which dtype the model is loaded and saved: "auto" is the checkpoint's own.
        num_holdout_samples: windows on which the loss before and after is measured, never calibrated on.
        trust_remote_code: run code that comes with the model.
    """

    method: str = "wanda"
    sparsity: float | None = None
    pattern: str | None = None
    refine: str | None = None
    compensation: str | None = None
    sequential: str | None = None
    target: str | None = None
    mix: float | None = None
    residual: float | None = None
    dataset: str | None = None
    num_calibration_samples: int = 128
    max_seq_length: int | None = None
    batch_size: int = 8
    seed: int = 0
    learning: LearningOptions = field(default_factory=LearningOptions)
    keep_heads: bool = False
    round_channels: int = 1
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    num_holdout_samples: int = 8
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Everything that can be wrong without a model is found here.

        Raises:
            InputError: a value is not usable.
        """
        _check_choice("refine", self.refine, REFINEMENTS)
        _check_choice("compensation", self.compensation, COMPENSATIONS)
        _check_choice("sequential", self.sequential, tuple(IN_ORDER))
        _check_choice("target", self.target, TARGETS)
        recipe = self.make_recipe()
        recipe.check()
        for name in ("mix", "residual"):
            if getattr(self, name) is not None and recipe.target != "dense":
                raise InputError(
                    f"{name} is part of a dense target, and the target is {recipe.target}: add --target dense"
                )
        self.learning.check()
        if self.learning != LearningOptions() and not recipe.criterion.learns:
            raise InputError(f"{self.learning.given()} steers the learning of masks, and {self.method} learns none: "
                             "leave it out, or use --method maskprune")  # fmt: skip
        if (self.keep_heads or self.round_channels != 1) and not isinstance(recipe.pattern, Uniform):
            raise InputError(f"keep_heads and round_channels belong to pattern uniform, not to {recipe.pattern}")
        for name in ("num_calibration_samples", "batch_size", "round_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise InputError(f"max_seq_length is {self.max_seq_length}: at least 2 tokens are needed")
        if self.num_holdout_samples < 0:
            raise InputError(f"num_holdout_samples is {self.num_holdout_samples}: give 0 or more")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}: give a number from 0 to 2^63 - 1")
        check_dtype(self.dtype)
        check_device(self.device)
        for name in ("ignore", "targets"):
            if isinstance(getattr(self, name), str):
                raise InputError(f"{name} is one string: give a list of patterns")
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def make_pattern(self) -> RunPattern:
        """The pattern with its sparsity."""
        return parse_pattern(self.pattern or criterion(self.method).pattern, self.sparsity)

    def make_recipe(self) -> Recipe:
        """A fresh criterion with this run's seed, the pattern, and what the user adds to them."""
        chosen, pattern = criterion(self.method, self.seed, self.compensation), self.make_pattern()
        return Recipe(
            chosen,
            pattern,
            refine=self.refine or ("none" if isinstance(pattern, Uniform) else chosen.refine),
            sequential=self.sequential or chosen.sequential,
            target=self.target or chosen.target,
            mix=chosen.mix if self.mix is None else self.mix,
            residual=chosen.residual if self.residual is None else self.residual,
        )

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: with the method's own choices where the user made none."""
        recipe = self.make_recipe()
        axes = ("refine", "sequential", "target") + ("mix", "residual") * (recipe.target == "dense")
        chosen = {"compensation": recipe.criterion.compensation, **{name: getattr(recipe, name) for name in axes}}
        return {**asdict(self), "pattern": self.pattern or recipe.criterion.pattern, **chosen}


def _check_choice(name: str, given: str | None, known: tuple[str, ...]) -> None:
    if given is not None and given not in known:
        raise InputError(f"{name} '{given}' is unknown: choose from {', '.join(known)}")
