"""Random pruning: the floor that every other method must beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.sites import Site


class Random(Criterion):
    """S ~ U(0, 1), drawn from a generator seeded by (seed, site name): independent of order and processes."""

    name = "random"
    summary = "uniformly random scores; the floor of every comparison"
    source = "baseline"
    needs = frozenset()

    def score(self, site: Site) -> Tensor:
        """[out, in], uniform."""
        digest = hashlib.sha256(f"{self.seed}:{site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(site.shape, generator=generator).to(site.weight.device)
