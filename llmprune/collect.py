"""The statistics of one block's groups: fed while the block runs, reduced over the ranks, given to the sites."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from llmprune.cross import Cross
from llmprune.errors import InputError
from llmprune.inputs import InputStatistics
from llmprune.sites import Site
from llmprune.wiring import Group

MINIMUM_TOKENS = 32
"""An expert that sees fewer tokens borrows the statistics of all its siblings."""


class Collector:
    """Gathers what the recipe needs of every group's input."""

    def __init__(self, groups: Sequence[Group], needs: AbstractSet[str], device: torch.device) -> None:
        self._needs, self._device = needs, device
        self._of: dict[Group, InputStatistics] = {group: self._new(group) for group in groups}

    def _new(self, group: Group) -> InputStatistics:
        width, cross = group.leader.shape[1], None
        if "cross" in self._needs and not group.routed:
            rows = group.leader.shape[0] if group.joins_stream else width
            cross = Cross(rows, width, self._device, of_output=group.joins_stream)
        return InputStatistics(width, self._needs - {"cross"}, self._device, cross)

    def add(self, group: Group, x: Tensor, z: Tensor | None = None) -> None:
        """The tokens x [..., in] have arrived; z [..., in or out] is what the dense model has for them."""
        self._of[group].update(x, z)

    def hand_out(self, groups: Sequence[Group]) -> list[Site]:
        """Reduce over the ranks and give every site of the groups its statistics; returns the sites.

        Raises:
            InputError: a site saw no token, or activations are not finite.
        """
        for group in groups:  # the same order on every rank
            statistics = self._of.pop(group)
            statistics.all_reduce_()
            if not statistics.finite():
                raise InputError(
                    f"the activations that enter {group.leader.name} are not finite (NaN or infinity): the model is "
                    "broken or overflows in this dtype; try --dtype float32"
                )
            for site in group.sites:
                site.statistics = statistics
        sites = [site for group in groups for site in group.sites]
        if self._needs:
            self._pool_rare_experts(sites)
        return sites

    def _pool_rare_experts(self, sites: Sequence[Site]) -> None:
        families: dict[str, list[Site]] = {}
        for site in sites:
            families.setdefault(site.family, []).append(site)
        for siblings in families.values():
            seen = [site.statistics for site in siblings if site.statistics is not None]
            assert len(seen) == len(siblings)
            if len(siblings) > 1 and any(statistics.count < MINIMUM_TOKENS for statistics in seen):
                pool = InputStatistics(siblings[0].shape[1], self._needs - {"cross"}, self._device)
                for statistics in seen:
                    pool.merge(statistics)
                for site, statistics in zip(siblings, seen, strict=True):
                    if statistics.count < MINIMUM_TOKENS:
                        site.statistics, site.pooled = pool, True
            for site in siblings:
                if site.statistics is None or site.statistics.count == 0:
                    raise site.without_tokens()
