"""First and second moments of a site's inputs, in one object that serves every diagonal criterion.

Wanda needs the energy E[x^2], STADE the variance and the mean; both follow from (count, mean, M2), and
these merge exactly, so that the order of the batches and the number of processes do not matter. The
textbook form sum(x^2) - n mean^2 is never used: it cancels on features with a large mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.collectives import gathered


class Moments:
    """Running mean and centred sum of squares of the rows fed to `update`.

    Attributes:
        count: number of tokens seen (rows, never sequences or batches).
        mean: [in] float32.
        m2: [in] float32, sum over tokens of (x - mean)^2.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float32, device=device)
        self.m2 = torch.zeros(width, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Add the tokens x [n, in]."""
        if len(x):
            mean = x.mean(0)
            self._merge(len(x), mean, (x - mean).square_().sum(0))

    def merge(self, other: Moments) -> None:
        """Add everything that `other` has seen."""
        self._merge(other.count, other.mean, other.m2)

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        """Chan, Golub and LeVeque (1979): the parallel update of mean and M2."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * (count / total))
        self.count = total

    def all_reduce_(self) -> None:
        """Replace this rank's moments by those of all ranks; every rank ends with the same bits."""
        counts = gathered(torch.tensor([self.count], device=self.mean.device))
        parts = gathered(torch.stack([self.mean, self.m2]))
        self.count = 0
        self.mean, self.m2 = torch.zeros_like(self.mean), torch.zeros_like(self.m2)
        for count, part in zip(counts, parts, strict=True):
            self._merge(int(count.item()), part[0], part[1])

    @property
    def variance(self) -> Tensor:
        """[in], M2 / (n - 1)."""
        return self.m2 / max(self.count - 1, 1)

    @property
    def energy(self) -> Tensor:
        """[in], E[x^2] = M2 / n + mean^2."""
        return self.m2 / max(self.count, 1) + self.mean.square()

    def finite(self) -> bool:
        """False if any token brought NaN or infinity."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.m2).all())
