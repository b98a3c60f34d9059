"""THE walk over the decoder blocks: capture, collect, yield, propagate. Written once, for every method.

For each block in order: it runs over the calibration windows while the statistics of its sites' inputs are
gathered; its sites are handed to the caller, who prunes them; and what the pruned block returns is what the
next block will see. In which order the sites of a block come, and how often it runs for that, is in `orders`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from llmprune_eval.evaluate import evaluating
from torch import Tensor

from llmprune.blocks import Block
from llmprune.collect import Collector
from llmprune.collectives import gathered_objects, world
from llmprune.dense_side import DenseSide
from llmprune.errors import InputError
from llmprune.learning import learn
from llmprune.orders import IN_ORDER, Job, check_order
from llmprune.sites import Site
from llmprune.stream import Stream, visiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

CPU_TOKENS = 1024
"""Tokens that go through a block at a time on a CPU. With 4096 the same work took 7 to 10 % longer."""


@dataclass
class Visit:
    """A block, with some of its sites ready to be pruned. What is done to them is what later sites see.

    Attributes:
        index: position among the blocks.
        block: the block.
        sites: those that are ready, with their statistics. With --sequential site a block comes several times.
        seconds: wall time of its phases: collect, prune, propagate.
        relative_error: ||pruned output - dense output|| / ||what the dense block adds to the residual stream||
            on the first micro-batch of this rank; None without calibration windows.
    """

    index: int
    block: Block
    sites: list[Site] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    relative_error: float | None = None

    def spent(self, phase: str, start: float) -> None:
        """Add to a phase the time since `start`, by time.perf_counter."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    windows: Tensor | None,
    *,
    needs: AbstractSet[str] = frozenset(),
    sequential: str = "block",
    residual: float = 1.0,
    batch_size: int = 8,
    device: torch.device | None = None,
    done: Callable[[Visit], None] = lambda visit: None,
) -> Iterator[Visit]:
    """Visit the blocks in order.

    Args:
        windows: token ids [n, seqlen], all ranks' together (each takes its share); None without data.
        needs: statistics to gather, among "moments", "gram", "covariance" and "cross" (with the dense model's).
        sequential: "block" or "site", see `orders`.
        residual: with "cross", the share of the stream's gathered error that is added to the targets.
        batch_size: windows per micro-batch, at most.
        device: where the visited block computes; None leaves every block where it is.
        done: called with the visit once its block has been propagated.

    Raises:
        InputError: activations are not finite, a site saw no token, or a block does not allow the order.
    """
    rank, ranks = world()
    own = torch.empty(0, 1, dtype=torch.long) if windows is None else windows[rank::ranks]
    with evaluating(model), eager_experts(model, blocks):
        modules = [block.module for block in blocks]
        stream = Stream(model, modules, own, windows_per_pass(model, own, batch_size, device))
        dense = DenseSide(stream.copy(), stream, residual) if "cross" in needs else None
        for index, block in enumerate(blocks):
            visit = Visit(index, block)
            with visiting(block.module, device) as place:
                if windows is None:
                    visit.sites = block.sites
                    with _timed(visit, "prune"):
                        yield visit
                else:
                    steps = _steps(stream, visit, dense, needs, sequential, place)
                    while _next(visit, steps):
                        with _timed(visit, "prune"):
                            yield visit
                        for site in visit.sites:
                            site.forget()
            stream.forget(index)
            done(visit)


def _steps(
    stream: Stream,
    visit: Visit,
    dense: DenseSide | None,
    needs: AbstractSet[str],
    sequential: str,
    device: torch.device,
) -> Iterator[list[Site]]:
    """The sites of a block as they become ready; at the end the stream has passed it."""
    first: list[Tensor] = []  # what the dense block makes of the first micro-batch

    def run_first() -> None:
        first.append(stream.run(visit.index, 0).to("cpu", copy=True))

    def accept(batch: int, output: Tensor) -> None:
        _accept(stream, visit, batch, output, first[0] if first and batch == 0 else None)

    wiring, watched = learn(visit.block.module, visit.block.sites, run_first if len(stream) else None)
    if dense is not None:
        dense.run(visit.index, wiring)
    # Nothing comes behind the last block: only its error is to be measured, on the first micro-batch.
    batches = min(len(stream), 1) if visit.index == stream.blocks - 1 else len(stream)
    collector = Collector(wiring.groups, needs, device)
    job = Job(visit.index, stream, wiring, watched, collector, dense, accept, batches)
    check_order(job, sequential)
    yield from IN_ORDER[sequential](job)


def _next(visit: Visit, steps: Iterator[list[Site]]) -> bool:
    """Make the next sites ready; False once there are none and the stream has passed the block."""
    start = time.perf_counter()
    visit.sites = next(steps, [])
    visit.spent("collect" if visit.sites else "propagate", start)
    return bool(visit.sites)


def _accept(stream: Stream, visit: Visit, batch: int, output: Tensor, dense: Tensor | None) -> None:
    """Replace a micro-batch by the pruned block's output; where the dense block's is given, measure the error."""
    if not torch.isfinite(output.sum(dtype=torch.float32)) and not torch.isfinite(output).all():  # cheap one first
        raise InputError(
            f"the output of {visit.block.name} is not finite (NaN or infinity): the model is broken or "
            "overflows in this dtype; try --dtype float32"
        )
    if dense is not None:
        output = output.to("cpu")
        added = (dense.float() - stream.hidden[batch].float()).norm().item()
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
    visit.spent(phase, start)
