"""THE walk over the decoder blocks: capture, collect, yield, propagate. Written once, for every method.

For each block in order: it runs over the calibration windows, still dense, while the statistics of its
sites' inputs are gathered; it is handed to the caller, who prunes it; it runs again, and what it now
returns is what the next block will see. That is two block forwards per token. The first is cut short at
the last site's input, and the last block needs no second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.collectives import gathered_objects, world
from llmprune.errors import InputError
from llmprune.observe import AllSeen, Observer
from llmprune.sites import Block
from llmprune.stream import Stream, visiting

log = logging.getLogger(__name__)

CPU_TOKENS = 1024
"""Tokens that go through a block at a time on a CPU. With 4096 the same work took 7 to 10 % longer."""


@dataclass
class Visit:
    """One block, ready to be pruned. What is done to it before the next is asked for is what later blocks see.

    Attributes:
        index: position among the blocks.
        block: the block with its sites, whose statistics are filled in.
        seconds: wall time of its phases: collect, prune, propagate.
        relative_error: ||pruned output - dense output|| / ||what the dense block adds to the residual stream||
            on the first micro-batch of this rank; None without calibration windows.
    """

    index: int
    block: Block
    seconds: dict[str, float] = field(default_factory=dict)
    relative_error: float | None = None


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Tensor | None,
    *,
    needs: AbstractSet[str] = frozenset(),
    batch_size: int = 8,
    device: torch.device | None = None,
    done: Callable[[Visit], None] = lambda visit: None,
) -> Iterator[Visit]:
    """Visit the blocks in order.

    Args:
        windows: token ids [n, seqlen], all ranks' together (each takes its share); None without data.
        needs: statistics to gather, among "moments", "gram" and "covariance".
        batch_size: windows per micro-batch, at most.
        device: where the visited block computes; None leaves every block where it is.
        done: called with the visit once its block has been propagated.

    Raises:
        InputError: activations are not finite, or a site saw no token.
    """
    rank, ranks = world()
    own = torch.empty(0, 1, dtype=torch.long) if windows is None else windows[rank::ranks]
    with evaluating(model), eager_experts(model, blocks):
        stream = Stream(
            model, [block.module for block in blocks], own, windows_per_pass(model, own, batch_size, device)
        )
        for index, block in enumerate(blocks):
            visit = Visit(index, block)
            with visiting(block.module, device) as place:
                dense = None
                if windows is not None and block.sites:
                    with _timed(visit, "collect"):
                        dense = _collect(stream, visit, needs, place)
                with _timed(visit, "prune"):
                    yield visit
                for site in block.sites:
                    site.statistics = None
                with _timed(visit, "propagate"):
                    _propagate(stream, visit, dense, last=index == len(blocks) - 1)
            stream.forget(index)
            done(visit)


def _collect(stream: Stream, visit: Visit, needs: AbstractSet[str], device: torch.device) -> Tensor | None:
    """Gather the statistics; returns the dense output of the first micro-batch."""
    first: Tensor | None = None
    with Observer(visit.block.module, visit.block.sites, needs, device) as observer:
        for batch in range(len(stream)):
            observer.begin_pass(complete=batch == 0)
            try:
                output = stream.run(visit.index, batch)
            except AllSeen:
                continue
            if batch == 0:
                first = output.to("cpu", copy=True)
    observer.hand_out()
    return first


def _propagate(stream: Stream, visit: Visit, dense: Tensor | None, last: bool) -> None:
    """Replace the stream's hidden states by the pruned block's output, and measure the block's error.

    Of the last block only the first micro-batch is run, for that measurement.
    """
    for batch in range(min(len(stream), 1) if last else len(stream)):
        output = stream.run(visit.index, batch)
        if not torch.isfinite(output.sum(dtype=torch.float32)) and not torch.isfinite(output).all():  # cheap one first
            raise InputError(
                f"the output of {visit.block.name} is not finite (NaN or infinity): the model is broken or "
                "overflows in this dtype; try --dtype float32"
            )
        if batch == 0 and dense is not None:
            output = output.to("cpu")
            added = (dense.float() - stream.hidden[0].float()).norm().item()
            visit.relative_error = (output.float() - dense.float()).norm().item() / added if added else None
        stream.hidden[batch].copy_(output)  # in place: new buffers for every block cost a tenth of the pass


@torch.no_grad()
def loss(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | None = None,
) -> float:
    """Mean next-token negative log-likelihood in nats per predicted token of windows [n, seqlen].

    Takes one block at a time to the device, as the walk does; each rank scores its share of the windows.
    """
    rank, ranks = world()
    total, count = 0.0, 0
    with evaluating(model):
        own = windows[rank::ranks]
        stream = Stream(
            model, [block.module for block in blocks], own, windows_per_pass(model, own, batch_size, device)
        )
        for index, block in enumerate(blocks):
            with visiting(block.module, device):
                for batch in range(len(stream)):
                    stream.hidden[batch].copy_(stream.run(index, batch))
            stream.forget(index)
        for batch in range(len(stream)):
            logits = stream.logits(batch)[:, :-1].float()
            labels = stream.tokens(batch)[:, 1:].to(logits.device)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += labels.numel()
    totals, counts = zip(*gathered_objects((total, count)), strict=True)
    return float(sum(totals) / sum(counts))


def windows_per_pass(model: PreTrainedModel, windows: Tensor, batch_size: int, device: torch.device | None) -> int:
    """`batch_size`; on a CPU fewer where that many windows [n, seqlen] would only push one another out of its cache."""
    on_cpu = (device or model.device).type == "cpu"
    return max(1, min(batch_size, CPU_TOKENS // windows.shape[1])) if on_cpu else batch_size


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode (no dropout), with every module's own mode restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager_experts(model: PreTrainedModel, blocks: Sequence[Block]) -> Iterator[None]:
    """Run fused experts one by one: the grouped kernels show no expert's own tokens."""
    with ExitStack() as stack:
        if any(site.index is not None for block in blocks for site in block.sites):
            stack.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation("eager")
        yield


@contextmanager
def _timed(visit: Visit, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    visit.seconds[phase] = visit.seconds.get(phase, 0.0) + time.perf_counter() - start
