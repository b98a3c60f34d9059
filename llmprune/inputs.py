"""What one pass over the calibration tokens leaves behind for a site: its statistics and a few raw rows.

Sites that receive the same tensor (q, k, v; gate, up) share one object.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from llmprune.cross import Cross
from llmprune.gram import Gram
from llmprune.moments import Moments

SAMPLE_ROWS = 256
ROWS_PER_BATCH = 32


class InputStatistics:
    """Statistics of the rows that enter a site.

    Attributes:
        count: number of tokens.
        moments: present if a criterion asked for "moments".
        gram: present if a criterion asked for "gram", or for "covariance" to have its mean and variance as well.
        cross: present if the dense model is to be compared with: its rows against these.
        sample: [<= SAMPLE_ROWS, in] float32, evenly spaced rows of this rank's first batches, on which the
            output error of a pruned site is measured.
        dense_sample: the dense model's side of the same rows; empty without `cross`.
    """

    def __init__(
        self,
        width: int,
        needs: AbstractSet[str],
        device: torch.device | str = "cpu",
        cross: Cross | None = None,
    ) -> None:
        unknown = set(needs) - {"moments", "gram", "covariance"}
        assert not unknown, f"no such statistic: {unknown}"
        self.width = width
        self.count = 0
        self.moments = Moments(width, device) if "moments" in needs else None
        pairs = needs & {"gram", "covariance"}
        self.gram = Gram(width, device, centred="covariance" in needs) if pairs else None
        self.cross = cross
        self.sample = torch.empty(0, width, dtype=torch.float32, device=device)
        self.dense_sample = torch.empty(0, 0 if cross is None else len(cross.z_mean), device=device)

    def update(self, x: Tensor, z: Tensor | None = None) -> None:
        """Add the tokens x [..., in] of any floating dtype, and for `cross` the dense model's z [..., rows]."""
        x = x.detach().reshape(-1, self.width).float()
        self.count += len(x)
        for part in (self.moments, self.gram):
            if part is not None:
                part.update(x)
        missing = SAMPLE_ROWS - len(self.sample)
        rows = slice(None, min(missing, ROWS_PER_BATCH) * (step := max(1, len(x) // ROWS_PER_BATCH)), step)
        if missing > 0 and len(x):
            self.sample = torch.cat([self.sample, x[rows]])
        if self.cross is not None:
            assert z is not None
            z = z.detach().to(x.device).reshape(len(x), -1).float()
            self.cross.update(z, x)
            if missing > 0:
                self.dense_sample = torch.cat([self.dense_sample, z[rows]])

    def merge(self, other: InputStatistics) -> None:
        """Add everything that `other` has seen of its own rows: the dense model's are not pooled."""
        self.count += other.count
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram)
        self.sample = torch.cat([self.sample, other.sample])[:SAMPLE_ROWS]

    def all_reduce_(self) -> None:
        """Sum over the ranks; the sample stays this rank's own."""
        for part in (self.moments, self.gram, self.cross):
            if part is not None:
                part.all_reduce_()
                self.count = part.count

    @property
    def energy(self) -> Tensor:
        """[in], E[x^2]."""
        return self._part.energy

    @property
    def mean(self) -> Tensor:
        """[in], E[x]."""
        return self._part.mean

    @property
    def variance(self) -> Tensor:
        """[in], with n - 1."""
        return self._part.variance

    @property
    def _part(self) -> Moments | Gram:
        """Whichever statistic was gathered."""
        part = self.moments or self.gram
        assert part is not None, "the criterion did not ask for a statistic"
        return part

    def finite(self) -> bool:
        """False if any token brought NaN or infinity."""
        parts = (self.moments, self.gram, self.cross)
        return all(part.finite() for part in parts if part is not None) and bool(torch.isfinite(self.sample).all())
