"""The wiring of a block, learned by watching one forward pass.

Which sites receive the same tensor, in which order the inputs arrive, whether a norm made them, and which
outputs are added to the residual stream as they are: seen from the tensors, so that nothing here knows an
architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.collectives import gathered_objects
from llmprune.sites import Site
from llmprune.wiring import Group, SliceWatch, Wiring, first_of

_SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


@dataclass
class Watched:
    """What one pass has shown.

    Attributes:
        arrivals: the inputs of the sites in order of arrival.
        leaders: site -> the first that received the same tensor.
    """

    arrivals: list[tuple[Site, Tensor]] = field(default_factory=list)
    leaders: dict[Site, Site] = field(default_factory=dict)
    fed_by_norm: set[Site] = field(default_factory=set)
    joining: set[Site] = field(default_factory=set)


def learn(block: nn.Module, sites: Sequence[Site], run: Callable[[], object] | None) -> tuple[Wiring, Watched]:
    """Watch one complete forward of `block`, started by `run` (None on a rank that has no windows).

    All ranks take over what the first has seen. Sets `fed_by_norm` of every site.

    Raises:
        InputError: a site was not reached, nor any of its sibling experts.
    """
    seen = Watched()
    if run is not None:
        watch = _Watch(block, sites, seen)
        with watch.hooks(), watch:
            run()
    own = [] if run is None else [_described(seen)]
    order, normed, repeats = next(found[0] for found in gathered_objects(own) if found)
    by_name = {site.name: site for site in sites}
    siblings = Counter(site.family for site in sites)
    groups = [Group([by_name[name] for name in names], stage, joins) for names, stage, joins in order]
    reached = {name for names, _, _ in order for name in names}
    stage_of = {by_name[name].family: stage for names, stage, _ in order for name in names}
    normed_families = {by_name[name].family for name in normed}
    for site in sites:
        site.fed_by_norm = site.name in normed or (site.name not in reached and site.family in normed_families)
        if site.name not in reached:
            if site.family not in stage_of:
                raise site.without_tokens()
            groups.append(Group([site], stage_of[site.family]))
    for group in groups:
        group.routed = group.leader.index is not None or siblings[group.leader.family] > 1
        group.joins_stream &= not group.routed
    return Wiring(groups, repeats), seen


def _described(seen: Watched) -> tuple[list[tuple[list[str], int, bool]], list[str], list[str]]:
    """The groups as (names, stage, joins_stream), the sites fed by a norm, and those called again."""
    stages: dict[str, int] = {}
    members: dict[Site, list[Site]] = {}
    for site, leader in seen.leaders.items():
        members.setdefault(leader, []).append(site)
        if leader is site:
            stages.setdefault(site.family if site.index is not None else site.name, len(stages))
    groups = [
        (
            [site.name for site in group],
            stages[leader.family if leader.index is not None else leader.name],
            len(group) == 1 and leader in seen.joining,
        )
        for leader, group in members.items()
    ]
    arrived = [site.name for site, _ in seen.arrivals]
    repeats = sorted({name for name in arrived if arrived.count(name) > 1})
    return groups, [site.name for site in seen.fed_by_norm], repeats


class _Watch(SliceWatch):
    """Hooks and the sight of sums, for one pass. Every tensor is kept: a freed one's address could come back."""

    def __init__(self, block: nn.Module, sites: Sequence[Site], seen: Watched) -> None:
        super().__init__([site for site in sites if site.index is not None], self._saw_input)
        self._block, self._sites, self._seen = block, sites, seen
        self._kept: list[Tensor] = []
        self._inputs: dict[tuple[object, ...], Site] = {}
        self._norms: set[int] = set()
        self._stream: set[tuple[int, int]] = set()  # the residual stream, as long as all that joined it is known
        self._outputs: dict[tuple[int, int], set[Site]] = {}  # outputs of sites, and sums of such

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the modules as well; around the mode itself."""
        with ExitStack() as stack:
            stack.callback(self._block.register_forward_pre_hook(self._before_block).remove)
            for module in self._block.modules():
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(self._after_norm).remove)
            for site in (site for site in self._sites if site.index is None):
                before, after = self._around(site)
                stack.callback(site.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(site.module.register_forward_hook(after).remove)
            yield

    def _before_block(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self._stream.add(self._key(args[0]))

    def _after_norm(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if isinstance(output, Tensor):
            self._kept.append(output)
            self._norms.add(output.untyped_storage().data_ptr())

    def _around(self, site: Site) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._saw_input(site, first_of(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._outputs[self._key(output)] = {site}

        return before, after

    def _saw_input(self, site: Site, x: Tensor) -> None:
        key = (x.data_ptr(), x.shape, x.stride(), x._version) if x.numel() else (site,)
        self._seen.arrivals.append((site, x))
        self._seen.leaders.setdefault(site, self._inputs.setdefault(key, site))
        if x.untyped_storage().data_ptr() in self._norms:
            self._seen.fed_by_norm.add(site)

    def _key(self, x: Tensor) -> tuple[int, int]:
        self._kept.append(x)
        return x.data_ptr(), x.numel()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _SUMS:
            return super().__torch_function__(func, types, args, kwargs)
        scaled = bool(kwargs)  # alpha, or a result that is written elsewhere
        parts = [self._key(part) for part in args[:2] if isinstance(part, Tensor)]
        result = super().__torch_function__(func, types, args, kwargs)
        self._saw_sum([] if scaled else parts, self._key(result))
        return result

    def _saw_sum(self, parts: list[tuple[int, int]], result: tuple[int, int]) -> None:
        joining = [self._outputs.pop(part, None) for part in parts]
        streams = [part in self._stream for part in parts]
        self._stream.discard(result)  # a sum in place; known again if all that came is
        if len(parts) < 2:
            return
        for sites, other_is_stream in zip(joining, reversed(streams), strict=True):
            if sites and other_is_stream:
                self._seen.joining |= sites
                self._stream.add(result)
        if joining[0] and joining[1]:
            self._outputs[result] = joining[0] | joining[1]
