"""In which order the sites of a block are measured and pruned.

"block": all of them while the block is still dense, which is then run again for its output. "site": one group
after the other, each measured with its predecessors already pruned. The block is run once all the same: every
micro-batch waits, in a greenlet of its own, where a group's input arrives, until that has been measured on all
of them and pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from llmprune.collect import Collector
from llmprune.dense_side import DenseSide
from llmprune.errors import InputError
from llmprune.learning import Watched
from llmprune.sites import Site
from llmprune.stream import Stream
from llmprune.wiring import Group, SliceWatch, Wiring, listening


@dataclass
class Job:
    """One block, ready to be measured.

    Attributes:
        index: its position.
        watched: what its first micro-batch has shown.
        dense: the dense model's values, or None.
        accept: called with a micro-batch and the pruned block's output.
        batches: of how many micro-batches, from the first, the output is wanted.
    """

    index: int
    stream: Stream
    wiring: Wiring
    watched: Watched
    collector: Collector
    dense: DenseSide | None
    accept: Callable[[int, Tensor], None]
    batches: int

    def add(self, batch: int, group: Group, x: Tensor) -> None:
        """Measure what has arrived at a group."""
        z = None if self.dense is None else self.dense.take(batch, group)
        self.collector.add(group, x, z)


class AllSeen(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a block's forward once every group has received its input: the rest is not needed."""


def in_block_order(job: Job) -> Iterator[list[Site]]:
    """Measure all sites of the dense block, hand them out together, and run the pruned block."""
    by_leader = {group.leader: group for group in job.wiring.groups}
    seen: set[Group] = set()
    batch = 0

    def arrived(group: Group, x: Tensor) -> None:
        job.add(batch, group, x)
        if job.dense is not None and group.joins_stream:
            job.dense.settle(batch, group, None)  # nothing is pruned yet: all it can do is to trust it
        seen.add(group)
        # A block that calls a site twice in one pass is never cut short: the second call would be lost.
        if batch and len(seen) == len(job.wiring.groups) and not job.wiring.repeats:
            raise AllSeen

    for site, x in job.watched.arrivals:  # the first micro-batch
        if site in by_leader:
            arrived(by_leader[site], x)
    job.watched.arrivals.clear()
    slices = [site for site in by_leader if site.index is not None]
    watch = SliceWatch(slices, lambda site, x: arrived(by_leader[site], x))
    with listening(job.wiring.groups, arrived):
        for batch in range(1, len(job.stream) if by_leader else 0):
            seen.clear()
            try:
                with watch:
                    job.stream.run(job.index, batch)
            except AllSeen:
                continue
    if job.wiring.groups:
        yield job.collector.hand_out(job.wiring.groups)
    for batch in range(job.batches):
        job.accept(batch, job.stream.run(job.index, batch))


class _Runner(greenlet):
    """One micro-batch on its way through a block. Every switch to it returns where it waits, or its output."""

    def __init__(self, job: Job, batch: int) -> None:
        super().__init__(partial(job.stream.run, job.index, batch))
        self.batch = batch
        self.stage = -1  # where it waits
        self.payload: Any = None

    def advance(self, stage: int) -> None:
        """Go on until a stage of at least this number is reached, or the end."""
        while self.stage < stage and not self.dead:
            before = self.stage
            answer = self.switch()
            self.stage, self.payload = (stage, answer) if self.dead else answer
            assert self.stage > before or self.dead, "inputs arrived in another order than in the first micro-batch"


def _wait(stage: int, payload: Any) -> None:
    """Called inside a forward: hold this micro-batch until its stage has been pruned."""
    parent = getcurrent().parent
    assert parent is not None
    parent.switch((stage, payload))


def in_site_order(job: Job) -> Iterator[list[Site]]:
    """Hand out the sites stage by stage, each measured behind the pruned ones before it."""

    def returned(group: Group, output: Tensor) -> None:
        runner = getcurrent()
        if job.dense is not None and isinstance(runner, _Runner):
            job.dense.settle(runner.batch, group, output)

    job.watched.arrivals.clear()
    stages = job.wiring.stages()
    runners = [_Runner(job, batch) for batch in range(len(job.stream))]
    try:
        with (
            listening(job.wiring.groups, lambda group, x: _wait(group.stage, x), returned),
            _waiting_experts(stages),
        ):
            for groups in stages:
                for runner in runners:
                    runner.advance(groups[0].stage)
                    if not runner.dead and runner.stage == groups[0].stage:
                        _measure(job, groups, runner)
                yield job.collector.hand_out(groups)
            for runner in runners[: job.batches]:
                runner.advance(len(stages))
                job.accept(runner.batch, runner.payload)
    finally:
        for runner in runners:
            if not runner.dead:
                runner.throw()


def _measure(job: Job, groups: list[Group], runner: _Runner) -> None:
    if groups[0].leader.index is None:
        job.add(runner.batch, groups[0], runner.payload)
        return
    # Experts run once more than needed, for their inputs: a mode that sees products must not be left by a switch.
    by_leader = {group.leader: group for group in groups}
    with SliceWatch(list(by_leader), lambda site, x: job.add(runner.batch, by_leader[site], x)):
        runner.payload()


class _waiting_experts:  # noqa: N801 - used as a context manager only
    """Hold micro-batches at the modules of fused experts, once for every stage of theirs."""

    def __init__(self, stages: list[list[Group]]) -> None:
        self._stages: dict[torch.nn.Module, list[int]] = {}
        for groups in stages:
            if groups[0].leader.index is not None:
                self._stages.setdefault(groups[0].leader.module, []).append(groups[0].stage)

    def __enter__(self) -> None:
        self._handles = [module.register_forward_pre_hook(self._before, with_kwargs=True) for module in self._stages]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for stage in self._stages[module]:
            _wait(stage, partial(module.forward, *args, **kwargs))


def check_order(job: Job, sequential: str) -> None:
    """Raise InputError for a block that cannot be measured as asked."""
    again = job.wiring.repeats
    if again and (sequential == "site" or job.dense is not None):
        raise InputError(f"{again[0]} is called more than once in a pass: use --sequential block with --target own")
    apart = [group.leader.name for group in job.wiring.groups if group.routed and group.leader.index is None]
    if apart and sequential == "site":
        raise InputError(f"{apart[0]} is an expert with a module of its own: use --sequential block")


IN_ORDER: dict[str, Callable[[Job], Iterator[list[Site]]]] = {"block": in_block_order, "site": in_site_order}
