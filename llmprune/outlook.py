"""What every pattern makes of a model and every method needs for it, counted from the config alone.

Sizes, passes and memory are counted. Speeds are expectations; `llmprune bench` measures. The order of the methods by
quality was measured (eval/results/quality.csv and structured.csv), on small models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from llmprune_kernels.huggingface import is_plain_linear
from llmprune_kernels.pack24 import packed_shapes

from llmprune.config import PruneConfig
from llmprune.criteria import methods
from llmprune.errors import InputError
from llmprune.patterns import NM, Uniform
from llmprune.planning import WEIGHTS, Plan, make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PATTERNS = ("unstructured", "2:4", "uniform")
REGRESSION = {"compensation": "least-squares", "target": "dense", "sequential": "site"}
BEST_ZEROS = ("regress", "sparsegpt", "stade", "stade-w", "wanda", "ria", "magnitude", "random")
BEST_UNITS = ("obs + regression", "regress", "maskprune", "stade", "obs", "wanda", "taylor", "random", "magnitude")
"""Methods by what they lose, least first: the mean log of perplexity over dense perplexity in eval/results."""
PROBED = 4_000_000
"""Units are looked for, by gradients through one real block, where a block has at most so many parameters."""
PACKED = 0.5625
"""Bytes of 2:4 weights in 16 bits, packed, over dense: of four, two values and two bits of place for each."""
TIGHT = 1 / 2
"""Share of the memory above which a need is called close: measured peaks, less the libraries, were 1.5 to 2.1 times
what is counted here (eval/results/bench.csv)."""


@dataclass(frozen=True)
class Machine:
    """Bytes of memory, and the GPU if there is one."""

    memory: int
    gpu: str | None = None
    gpu_memory: int = 0


@dataclass(frozen=True)
class Outlook:
    """What a pattern makes of a model.

    Attributes:
        pattern: with its sparsity.
        problem: why it cannot be had, or "".
        removed: share of the decoder's parameters that is pruned.
        exact: False if that is what was asked for, met to within one unit.
        size: bytes of the file.
        packed: bytes of the file once `llmprune pack` has packed its 2:4 weights; None if it packs none.
        speedup: to expect of decoding, at most, where reading the weights takes the time; 1 is none.
        packed_speedup: a bound of decoding with packed 2:4 weights on a GPU that can, from the bytes it reads.
        widths: what every block keeps, where its units were looked for.
    """

    pattern: str
    problem: str = ""
    removed: float = 0.0
    exact: bool = True
    size: int = 0
    packed: int | None = None
    speedup: float = 1.0
    packed_speedup: float | None = None
    widths: dict[str, Any] | None = None


@dataclass(frozen=True)
class Needs:
    """What a method needs; memory in bytes, as `make_plan` counts it.

    Attributes:
        method: its name, and what is added to it.
        pattern: one of PATTERNS; "unstructured" stands for n:m too, which needs the same.
        passes: forward passes of the decoder over the calibration windows.
        memory: on the CPU.
        gpu_memory: on the GPU beside that; 0 where the CPU does everything.
        verdict: "fits", "close" or "does not fit", on the machine at hand.
    """

    method: str
    pattern: str
    passes: float
    memory: int
    gpu_memory: int
    verdict: str


def this_machine() -> Machine:
    """The one at hand, with its first GPU."""
    memory = psutil.virtual_memory().total
    if not torch.cuda.is_available():
        return Machine(memory)
    return Machine(memory, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)


def variants(order: Sequence[str]) -> dict[str, dict[str, str]]:
    """Methods by label, each as options: those whose quality was measured in their order, then the others."""
    labels = [*order, *(name for name in methods() if name not in order)]
    return {label: {"method": label.split()[0], **(REGRESSION if "+" in label else {})} for label in labels}


def configured(config: PruneConfig, pattern: str, options: Mapping[str, str]) -> PruneConfig:
    """The common config with a pattern and a method; n:m says its own sparsity."""
    sparsity = None if ":" in pattern else config.sparsity
    return replace(config, pattern=pattern, sparsity=sparsity, **options)  # type: ignore[arg-type]


def outlook(model: PreTrainedModel, config: PruneConfig, pattern: str, *, probe: bool) -> Outlook:
    """What a pattern gives; one that this model cannot have says why."""
    method = variants(BEST_UNITS if pattern == "uniform" else BEST_ZEROS)
    config = configured(config, pattern, next(iter(method.values())))
    shown = str(config.make_pattern()) if pattern != "unstructured" else f"unstructured {config.make_pattern()}"
    try:
        plan = make_plan(model, config, probe=probe)
    except InputError as error:
        return Outlook(shown, str(error))
    size, item = plan.memory[WEIGHTS], next(model.parameters()).element_size()
    read = plan.model_parameters - _looked_up(model)
    found = Outlook(shown, removed=plan.removed, size=size)
    if isinstance(plan.pattern, NM):
        sites = [site for block in plan.blocks for site in block.sites]
        saved = sum(_saved(one.shape, item) for one in sites if one.index is None and is_plain_linear(one.module))
        if not saved:
            return found
        return replace(found, packed=size - saved, packed_speedup=read / (read - saved / item))
    if isinstance(plan.pattern, Uniform):
        gone = round(plan.removed * plan.decoder_parameters)
        widths = plan.structure.describe() if plan.structure else None
        return replace(found, exact=widths is not None, size=size - gone * item, speedup=read / (read - gone),
                       widths=widths)  # fmt: skip
    return found


def _saved(shape: tuple[int, int], item: int) -> int:
    """Bytes that a 2:4 matrix of elements of `item` bytes takes less when it is packed.

    Experts side by side in one parameter are not packed, nor layers that compute in their own way.
    """
    values, places = packed_shapes(*shape)
    return item * (math.prod(shape) - math.prod(values)) - math.prod(places)


def _looked_up(model: PreTrainedModel) -> int:
    """Parameters of which a token needs one row: the input embedding, unless the head is tied to it."""
    given, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(given, torch.Tensor)
    return 0 if head is not None and head.weight is given else given.numel()


def all_needs(model: PreTrainedModel, config: PruneConfig, machine: Machine, possible: set[str]) -> list[Needs]:
    """Of every method for zeros and for units, where it makes them; the best first."""
    found = []
    for pattern, order in (("unstructured", BEST_ZEROS), ("uniform", BEST_UNITS)):
        for label, options in variants(order).items() if pattern in possible else ():
            try:
                chosen = configured(config, pattern, options)
            except InputError:  # this method cannot do that pattern
                continue
            plan = make_plan(model, chosen, probe=False, possible=True)
            found.append(_need(label, pattern, plan, machine))
    return found


def _need(label: str, pattern: str, plan: Plan, machine: Machine) -> Needs:
    memory, gpu_memory = (plan.host_memory, plan.device_memory) if machine.gpu else (plan.cpu_memory, 0)
    used = max(memory / machine.memory, gpu_memory / machine.gpu_memory if machine.gpu else 0.0)
    verdict = "fits" if used <= TIGHT else "close" if used <= 1 else "does not fit"
    return Needs(label, pattern, plan.passes, memory, gpu_memory, verdict)
