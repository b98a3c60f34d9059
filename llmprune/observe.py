"""Watch one block run and gather the statistics of its sites' inputs.

Modules are watched by forward pre-hooks. An expert's slice of a fused parameter has no module: its calls
are recognised by the memory that the weight argument lives in. Which sites share an input is found while
watching, so nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.collectives import gathered_objects
from llmprune.errors import InputError
from llmprune.inputs import InputStatistics
from llmprune.sites import Site

MINIMUM_TOKENS = 32
"""An expert that sees fewer tokens borrows the statistics of all its siblings."""

_PRODUCTS = (
    nn.functional.linear,
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
)


class AllSeen(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a block's forward once every site has received its input: the rest is not needed."""


class Observer:
    """Context manager that accumulates statistics for the sites of one block.

    Call `begin_pass` before each forward of the block; after the first complete one, later passes may be
    cut short by `AllSeen`.
    """

    def __init__(self, block: nn.Module, sites: Sequence[Site], needs: AbstractSet[str], device: torch.device):
        self._block, self._sites, self._needs, self._device = block, list(sites), needs, device
        self._leader: dict[Site, Site] = {}
        self._statistics: dict[Site, InputStatistics] = {}
        self._stack = ExitStack()
        self._norm_outputs: dict[int, Tensor] = {}
        self._repeats = False
        self._stop_early = False
        self._begin_inputs()
        slices = [site for site in sites if site.index is not None]
        self._watch = _SliceWatch(slices, self._saw) if slices else None

    def _begin_inputs(self) -> None:
        # While a site's leader is still to be found, the tensors themselves are kept until the pass ends: a freed
        # one's address could come back. Later that would only crowd the cache, at a tenth of the block's time.
        self._learning = len(self._leader) < len(self._sites)
        self._inputs: dict[tuple[object, ...], tuple[Site, Tensor | None]] = {}
        self._seen: set[Site] = set()
        self._norm_outputs.clear()

    def __enter__(self) -> Observer:
        for site in self._sites:
            if site.index is None:
                handle = site.module.register_forward_pre_hook(self._hook(site), with_kwargs=True)
                self._stack.callback(handle.remove)
        for module in self._block.modules():
            if "norm" in type(module).__name__.lower():
                self._stack.callback(module.register_forward_hook(self._norm_hook).remove)
        if self._watch is not None:
            self._stack.enter_context(self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._begin_inputs()

    def begin_pass(self, complete: bool) -> None:
        """Start a forward of the block. `complete` demands that it runs to its end."""
        self._begin_inputs()
        # A block that calls a site twice in one pass is never cut short: the second call would be lost.
        self._stop_early = not complete and not self._repeats

    def _hook(self, site: Site) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._saw(site, args[0] if args else next(iter(kwargs.values())))

        return before

    def _norm_hook(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._learning and isinstance(output, Tensor):
            self._norm_outputs[output.untyped_storage().data_ptr()] = output

    def _saw(self, site: Site, x: Tensor) -> None:
        key = (x.data_ptr(), x.shape, x.stride(), x._version)
        known = site in self._leader
        leader = self._leader.setdefault(site, self._inputs.get(key, (site, x))[0])
        if leader is site:
            self._inputs[key] = (site, x if self._learning else None)
            if site not in self._statistics:
                self._statistics[site] = InputStatistics(site.shape[1], self._needs, self._device)
            self._statistics[site].update(x)
        elif known and self._inputs.get(key, (None,))[0] is not leader:
            raise RuntimeError(f"{site.name} shared its input with {leader.name} in one pass and not in another")
        if not known:
            site.fed_by_norm = x.untyped_storage().data_ptr() in self._norm_outputs
        self._repeats |= site in self._seen
        self._seen.add(site)
        if self._stop_early and len(self._seen) == len(self._sites):
            raise AllSeen

    def hand_out(self) -> None:
        """Reduce over the ranks and give every site its statistics.

        Raises:
            InputError: a site saw no token, or activations are not finite.
        """
        leaders: dict[str, str] = {}
        norms: dict[str, bool] = {}
        own = {site.name: (leader.name, bool(site.fed_by_norm)) for site, leader in self._leader.items()}
        for ranks in gathered_objects(own):
            for name, (leader_name, normed) in ranks.items():
                leaders.setdefault(name, leader_name)
                norms.setdefault(name, normed)
        by_name = {site.name: site for site in self._sites}
        for site in self._sites:  # the same order on every rank
            site.fed_by_norm = norms.get(site.name)
            if leaders.get(site.name) == site.name:
                mine = self._statistics.get(site) or InputStatistics(site.shape[1], self._needs, self._device)
                mine.all_reduce_()
                self._statistics[site] = mine
                if not mine.finite():
                    raise InputError(
                        f"the activations that enter {site.name} are not finite (NaN or infinity): the model is "
                        "broken or overflows in this dtype; try --dtype float32"
                    )
        for site in self._sites:
            leader = by_name[leaders.get(site.name, site.name)]
            site.statistics = self._statistics.get(leader)
        if self._needs:
            self._pool_rare_experts()

    def _pool_rare_experts(self) -> None:
        families: dict[str, list[Site]] = {}
        for site in self._sites:
            families.setdefault(site.family, []).append(site)
        for siblings in families.values():
            seen = [(site, site.statistics.count if site.statistics else 0) for site in siblings]
            rare = [site for site, count in seen if count < MINIMUM_TOKENS]
            if len(siblings) > 1 and rare:
                pool = InputStatistics(siblings[0].shape[1], self._needs, self._device)
                for site in siblings:
                    if site.statistics is not None:
                        pool.merge(site.statistics)
                for site in rare:
                    site.statistics, site.pooled = pool, True
            for site in siblings:
                if site.statistics is None or site.statistics.count == 0:
                    raise InputError(
                        f"{site.name} received no calibration token: use more calibration text, or leave it "
                        f"unpruned with --ignore {site.name}"
                    )


class _SliceWatch(TorchFunctionMode):
    """Sees every matrix product and reports those whose weight is a slice of a fused parameter."""

    def __init__(self, slices: Sequence[Site], saw: Callable[[Site, Tensor], None]) -> None:
        super().__init__()
        self._saw = saw
        self._by_address = {site.weight.data_ptr(): site for site in slices}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            site = self._by_address.get(args[1].data_ptr())
            if site is not None and args[1].ndim == 2:
                stored_transposed = func is not nn.functional.linear
                if stored_transposed != site.transposed:
                    raise RuntimeError(f"{site.name} is used in another orientation than its module announces")
                self._saw(site, args[0])
        return func(*args, **(kwargs or {}))
