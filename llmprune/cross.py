"""Covariance of two streams of rows, for what compares the dense model with the pruned one."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.collectives import gathered, summed_
from llmprune.gram import full_float32


class Cross:
    """Running M = sum of (z - mean(z)) (x - mean(x))^T over the pairs fed to `update`, merged by Chan's formula.

    Attributes:
        count: number of pairs seen.
        z_mean, x_mean: [rows], [columns], float32.
        of_output: True if z is what a site should return, False if it is what it should receive.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu", *, of_output: bool = False) -> None:
        self.count = 0
        self.of_output = of_output
        self.z_mean = torch.zeros(rows, dtype=torch.float32, device=device)
        self.x_mean = torch.zeros(columns, dtype=torch.float32, device=device)
        self._centred = torch.zeros(rows, columns, dtype=torch.float32, device=device)

    def update(self, z: Tensor, x: Tensor) -> None:
        """Add the pairs z [n, rows], x [n, columns]."""
        if len(x) == 0:
            return
        z_mean, x_mean = z.mean(0), x.mean(0)
        with full_float32():
            self._centred.addmm_((z - z_mean).T, x - x_mean)
        total = self.count + len(x)
        dz, dx = z_mean - self.z_mean, x_mean - self.x_mean
        self._centred.addr_(dz, dx, alpha=self.count * len(x) / total)
        self.z_mean += dz * (len(x) / total)
        self.x_mean += dx * (len(x) / total)
        self.count = total

    def all_reduce_(self) -> None:
        """Replace this rank's sum by that of all ranks; every rank ends with the same bits."""
        counts = [int(c.item()) for c in gathered(torch.tensor([self.count], device=self.z_mean.device))]
        if len(counts) == 1:
            return
        total = sum(counts)
        own = self.z_mean.clone(), self.x_mean.clone()
        for mean in (self.z_mean, self.x_mean):
            shares = [part * (count / max(total, 1)) for part, count in zip(gathered(mean), counts, strict=True)]
            mean.copy_(torch.stack(shares).sum(0))
        self._centred.addr_(own[0] - self.z_mean, own[1] - self.x_mean, alpha=self.count)
        summed_(self._centred)
        self.count = total

    def matrix(self, centred: bool, offset: Tensor | float = 0.0) -> Tensor:
        """[rows, columns] float32: M, or the sum of (z - offset) x^T with nothing centred."""
        if centred:
            return self._centred
        return self._centred + self.count * torch.outer(self.z_mean - offset, self.x_mean)

    def finite(self) -> bool:
        """False if any pair brought NaN or infinity."""
        return bool(torch.isfinite(self._centred).all())
