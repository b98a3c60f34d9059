"""The API: prune a model in place, and get back what was done to it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from llmprune_eval.devices import resolve_device
from llmprune_eval.loading import check_finite, load_model, load_tokenizer
from llmprune_eval.ready_windows import Windows, as_windows
from llmprune_eval.surroundings import peak_memory
from llmprune_eval.windows import check_vocabulary, window_length
from tqdm import tqdm

from llmprune.biases import add_biases_
from llmprune.blocks import all_sites
from llmprune.calibration import Calibration, load_windows
from llmprune.checkpoint import save_checkpoint
from llmprune.collectives import from_rank_zero, gathered, gathered_objects, world
from llmprune.command_line import python_call, shell_command
from llmprune.config import PruneConfig
from llmprune.criteria import Criterion, Pruned
from llmprune.errors import InputError
from llmprune.planning import Plan, make_plan
from llmprune.recipe import Recipe
from llmprune.report import BlockReport, Report, SiteReport
from llmprune.sites import Site
from llmprune.structured.structure import Structure
from llmprune.structured.task import Task
from llmprune.targets import wanted_output
from llmprune.walk import Visit, loss, walk, windows_per_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneResult:
    """A pruned model and the account of it."""

    model: PreTrainedModel
    report: Report
    tokenizer: Any | None = None

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write a plain Hugging Face folder with a manifest, and prove in a fresh process that it reloads.

        Raises:
            InputError: the folder exists, cannot be written, or does not reload to the same model.
        """
        return save_checkpoint(self.model, Path(directory), self.report, self.tokenizer, overwrite=overwrite)


@torch.inference_mode(False)  # its tensors keep no versions, by which shared inputs are told apart
def prune(
    model: PreTrainedModel | str | Path,
    config: PruneConfig | None = None,
    *,
    tokenizer: Any | None = None,
    tokens: Windows | None = None,
    holdout: Windows | None = None,
    state: Path | None = None,
    resume: bool = False,
) -> PruneResult:
    """Prune a causal language model in place; with a uniform pattern, the result holds a smaller model of its own.

    Args:
        model: a model object, or a folder or Hub name to load.
        config: what to do; the default is Wanda at 50 %.
        tokenizer: needed to read text with a model object; loaded along with a folder.
        tokens: calibration windows [n, seqlen] (tensor, array or lists of ids), instead of the config's dataset.
        state: file in which a method that learns keeps what it has learned; with `resume` it goes on from there.
        holdout: windows [k, seqlen] to measure the loss before and after on, beside `tokens`.

    Raises:
        InputError: anything about the input that does not fit; nothing has been pruned then, unless the
            activations turn out not to be finite halfway, or a block not to allow the order of its sites.
    """
    config = config or PruneConfig()
    if resume and not config.make_recipe().criterion.learns:
        raise InputError(f"resume goes on with the learning of masks, and {config.method} learns none: leave it out")
    device: torch.device | None = resolve_device(config.device)
    name = str(model) if isinstance(model, (str, Path)) else (model.name_or_path or type(model).__name__)
    command = _command(config, name if isinstance(model, (str, Path)) else None, tokens, holdout)
    if isinstance(model, (str, Path)):
        model = load_model(name, config.dtype, config.trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(name, config.trust_remote_code)
    check_finite(model)
    if getattr(model, "hf_device_map", None) or (config.device == "auto" and model.device.type != "cpu"):
        device = None  # the blocks compute where they are
    plan = make_plan(model, config)
    calibration = _calibration(model, config, tokenizer, tokens, holdout)
    report = _prune_planned(model, config, plan, calibration, device, name, state, resume)
    report.command = command
    if plan.structure is not None:
        model = _cut_out(model, plan, plan.structure, report)
    return PruneResult(model, report, tokenizer)


def _command(config: PruneConfig, model: str | None, tokens: Windows | None, holdout: Windows | None) -> str:
    """What repeats the run; what came as an object, no shell can name."""
    if model is not None and tokens is None:
        return shell_command(config, model)
    return python_call(config, model, tokens=tokens is not None, holdout=holdout is not None)


def _cut_out(model: PreTrainedModel, plan: Plan, structure: Structure, report: Report) -> PreTrainedModel:
    """The model without what has been cleared."""
    smaller = structure.cut(model, plan.blocks)
    report.widths = structure.describe()
    report.removed = report.model_parameters - sum(p.numel() for p in smaller.parameters())
    return smaller


def _prune_planned(
    model: PreTrainedModel,
    config: PruneConfig,
    plan: Plan,
    calibration: Calibration | None,
    device: torch.device | None,
    name: str,
    state: Path | None,
    resume: bool,
) -> Report:
    """The loop: visit every block, prune its sites, go on."""
    start = time.perf_counter()
    recipe = config.make_recipe()
    criterion, pattern = recipe.criterion, recipe.pattern
    report = Report(name, config.as_dict(), str(pattern), criterion.group_name(pattern), plan.decoder_parameters,
                    plan.model_parameters, calibration.describe() if calibration else None)  # fmt: skip
    report.processes = world()[1]
    report.skipped = [vars(skipped) for skipped in plan.skipped]
    if calibration is not None and len(calibration.holdout):
        report.loss_before = loss(model, plan.blocks, calibration.holdout, batch_size=config.batch_size, device=device)
    if criterion.moves_bias:
        report.bias_flags = add_biases_(model, list(all_sites(plan.blocks)))
    windows = calibration.windows if calibration is not None else None
    if plan.structure is not None and windows is not None:
        batch_size = windows_per_pass(model, windows, config.batch_size, device)
        report.curves = _prepared(criterion, Task(model, plan.blocks, plan.structure, windows, batch_size, device,
                                                  config.seed, config.learning, state, resume))  # fmt: skip
    with tqdm(total=len(plan.blocks), desc=criterion.name, disable=world()[0] > 0 or None, leave=False) as bar:
        outcome: list[SiteReport] = []

        def done(visit: Visit) -> None:
            block = BlockReport(visit.block.name, list(outcome), visit.relative_error, visit.seconds)
            report.blocks.append(block)
            outcome.clear()
            bar.update()
            bar.set_postfix_str(_figures(block))
            log.info("%s: %s", block.name, _figures(block))

        for visit in walk(model, plan.blocks, windows, needs=recipe.needs, sequential=recipe.sequential,
                          residual=recipe.residual, batch_size=config.batch_size, device=device,
                          done=done):  # fmt: skip
            for site in visit.sites:
                outcome.append(_prune_site(site, recipe))
    _check_ranks_agree(plan)
    if report.loss_before is not None and calibration is not None:
        report.loss_after = loss(model, plan.blocks, calibration.holdout, batch_size=config.batch_size, device=device)
        _check_loss(report.loss_before + report.loss_after)
    report.seconds = _seconds(report, time.perf_counter() - start)
    report.peak_memory = peak_memory()
    return report


def _prepared(criterion: Criterion, task: Task) -> list[dict[str, Any]]:
    """Let the method look at the whole model; returns the curves of what it has learned."""
    criterion.prepare(task)
    return [dict(row) for row in task.curves]


@torch.no_grad()
def _prune_site(site: Site, recipe: Recipe) -> SiteReport:
    pruned = recipe.prune(site)
    error = _relative_error(site, pruned)
    site.write_(pruned.weight, pruned.keep, pruned.bias_shift)
    notes = ["pooled over the block's experts"] * site.pooled + [pruned.note] * bool(pruned.note)
    count = site.statistics.count if site.statistics is not None and recipe.needs else None
    zeros = pruned.keep.numel() - int(pruned.keep.sum())
    return SiteReport(site.name, site.shape, zeros, error, count, "; ".join(notes), pruned.residual)


def _relative_error(site: Site, pruned: Pruned) -> float | None:
    """||output - wanted|| / ||wanted||, biases left out, over the sampled tokens of all ranks."""
    if site.statistics is None:
        return None
    wanted = wanted_output(site)
    change = site.statistics.sample @ pruned.weight.T - wanted
    if pruned.bias_shift is not None:
        change += pruned.bias_shift
    squares = torch.stack([change.square().sum(), wanted.square().sum()])
    wrong, whole = (float(v) for v in torch.stack(gathered(squares)).sum(0))
    return (wrong / whole) ** 0.5 if whole > 0 else None


def _calibration(
    model: PreTrainedModel,
    config: PruneConfig,
    tokenizer: Any | None,
    tokens: Windows | None,
    holdout: Windows | None,
) -> Calibration | None:
    """The windows to use, the same on every rank; None for a method that needs none and was given none."""
    if tokens is None and config.dataset is None and not config.make_recipe().needs:
        return None
    if tokens is None:
        loaded = load_windows(config, model, tokenizer)
    else:
        windows = as_windows(tokens, "tokens")
        held = windows[:0] if holdout is None else as_windows(holdout, "holdout", least=0)
        for name, given in (("tokens", windows), ("holdout", held)):
            window_length(model, given.shape[1])
            check_vocabulary(model, given, name)
        loaded = Calibration(windows, held, {"dataset": "given as tensors"})
    return Calibration(from_rank_zero(loaded.windows), from_rank_zero(loaded.holdout), loaded.origin)


def _check_ranks_agree(plan: Plan) -> None:
    """Raise RuntimeError if two ranks hold different weights."""
    if world()[1] > 1:
        sums = {site.name: site.weight.double().sum().item() for site in all_sites(plan.blocks)}
        if any(other != sums for other in gathered_objects(sums)):
            raise RuntimeError("the processes hold different weights after pruning; please report this")


def _check_loss(value: float) -> None:
    """The walk has found every block in order, so that NaN or infinity can only come from behind the blocks."""
    if not math.isfinite(value):
        raise InputError(
            "the loss on the held-out windows is not finite (NaN or infinity): the model's head is broken or overflows "
            "in this dtype; try --dtype float32"
        )


def _figures(block: BlockReport) -> str:
    """One line about a block."""
    parts = [f"{len(block.sites)} sites, {block.sparsity:.1%} pruned"]
    if block.site_error is not None:
        parts.append(f"site error {block.site_error:.3f}")
    if block.relative_error is not None:
        parts.append(f"block error {block.relative_error:.3f}")
    return ", ".join([*parts, f"{sum(block.seconds.values()):.1f} s"])


def _seconds(report: Report, total: float) -> dict[str, float]:
    """Sums over the blocks by phase, and what is left: capturing inputs, measuring the loss."""
    phases = {p: sum(b.seconds.get(p, 0.0) for b in report.blocks) for p in ("collect", "prune", "propagate")}
    return {**phases, "other": total - sum(phases.values()), "total": total}
