"""What a run did, site by site, in numbers that were measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llmprune_eval.result import finite
from llmprune_eval.surroundings import versions

SCHEMA = 1
COLLAPSED_BLOCK = 0.8  # a block set to zero shows 1.0; healthy ones at 50 % show 0.2 to 0.5
COLLAPSED_PERPLEXITY = 10.0


@dataclass(frozen=True)
class SiteReport:
    """One site.

    Attributes:
        shape: (out, in).
        pruned: weights set to zero by the mask.
        relative_error: ||output - wanted|| / ||wanted|| (without bias) on a sample of the calibration tokens. Wanted is
            what the site's dense weights make of its input, or with --target dense the dense model's output there
            and the error that it is to cancel. None without data.
        tokens: calibration tokens behind its statistics (a pooled expert has the pool's); None without statistics.
        note: pooled experts, a raised damping, inputs that were never active, a bias that could not be moved, or "".
        residual: of the least squares that gave the weights, as a share of what it began with; None without.
    """

    name: str
    shape: tuple[int, int]
    pruned: int
    relative_error: float | None
    tokens: int | None
    note: str = ""
    residual: float | None = None

    @property
    def size(self) -> int:
        """Weights of the site."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class BlockReport:
    """One block; seconds by phase (collect, prune, propagate)."""

    name: str
    sites: list[SiteReport]
    relative_error: float | None
    seconds: dict[str, float]

    @property
    def sparsity(self) -> float:
        """Pruned share of the weights at this block's sites."""
        return sum(s.pruned for s in self.sites) / max(sum(s.size for s in self.sites), 1)

    @property
    def site_error(self) -> float | None:
        """Mean relative error of the block's sites."""
        errors = [s.relative_error for s in self.sites if s.relative_error is not None]
        return sum(errors) / len(errors) if errors else None


@dataclass
class Report:
    """A whole run.

    Attributes:
        widths: with a uniform pattern, the units of every block before and after, and what they hold.
        removed: parameters that are no longer there; None where pruned weights are stored as zeros.
        curves: of learning: loss, share kept, overlap of the pruned set with that of the row before, widths.
        command: what repeats the run, for the shell or in Python.
        loss_before, loss_after: nats per token on the held-out windows, None if none were to be had.
    """

    model: str
    config: dict[str, Any]
    pattern: str
    group: str
    decoder_parameters: int
    model_parameters: int
    calibration: dict[str, Any] | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    bias_flags: list[str] = field(default_factory=list)
    widths: dict[str, Any] | None = None
    removed: int | None = None
    curves: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    processes: int = 1
    peak_memory: int = 0

    @property
    def pruned(self) -> int:
        """Weights set to zero, or parameters cut out."""
        if self.removed is not None:
            return self.removed
        return sum(site.pruned for block in self.blocks for site in block.sites)

    @property
    def sparsity(self) -> float:
        """Pruned share of the weights at sites; of the decoder's parameters where they are cut out."""
        if self.removed is not None:
            return self.decoder_share
        return self.pruned / max(sum(site.size for block in self.blocks for site in block.sites), 1)

    @property
    def decoder_share(self) -> float:
        """Pruned share of all parameters of the decoder blocks."""
        return self.pruned / self.decoder_parameters

    @property
    def model_share(self) -> float:
        """Pruned share of all parameters of the model."""
        return self.pruned / self.model_parameters

    @property
    def perplexity_before(self) -> float | None:
        """On the held-out windows."""
        return _exp(self.loss_before)

    @property
    def perplexity_after(self) -> float | None:
        """On the same windows."""
        return _exp(self.loss_after)

    @property
    def warnings(self) -> list[str]:
        """What the user must not miss."""
        found = [
            f"{block.name} collapsed: its error is {block.relative_error:.0%} of what the dense block adds"
            for block in self.blocks
            if block.relative_error is not None and block.relative_error > COLLAPSED_BLOCK
        ]
        before, after = self.perplexity_before, self.perplexity_after
        if before is not None and after is not None and after > COLLAPSED_PERPLEXITY * before:
            found.append(f"the perplexity collapsed from {before:.4g} to {after:.4g} on held-out text")
        no_bias = [s.name for b in self.blocks for s in b.sites if "no bias to move" in s.note]
        if no_bias:
            found.append(
                f"{len(no_bias)} sites have no bias that the config could carry ({no_bias[0]}, ...): "
                "pruned there without moving the mean"
            )
        pooled = [s.name for b in self.blocks for s in b.sites if "pooled" in s.note]
        if pooled:
            found.append(f"{len(pooled)} experts saw too few tokens and used their block's pooled statistics")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and --json; every figure in full precision."""
        return {
            "schema": SCHEMA,
            **asdict(self),
            "pruned": self.pruned,
            "sparsity": self.sparsity,
            "decoder_share": self.decoder_share,
            "model_share": self.model_share,
            "perplexity_before": finite(self.perplexity_before),
            "perplexity_after": finite(self.perplexity_after),
            "warnings": self.warnings,
        }


def _exp(loss: float | None) -> float | None:
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf
