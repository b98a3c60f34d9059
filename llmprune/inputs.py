"""What one pass over the calibration tokens leaves behind for a site: its statistics and a few raw rows.

Sites that receive the same tensor (q, k, v; gate, up) share one object.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

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
        sample: [<= SAMPLE_ROWS, in] float32, evenly spaced rows of this rank's first batches, on which the
            output error of a pruned site is measured.
    """

    def __init__(self, width: int, needs: AbstractSet[str], device: torch.device | str = "cpu") -> None:
        unknown = set(needs) - {"moments", "gram", "covariance"}
        assert not unknown, f"no such statistic: {unknown}"
        self.width = width
        self.count = 0
        self.moments = Moments(width, device) if "moments" in needs else None
        pairs = needs & {"gram", "covariance"}
        self.gram = Gram(width, device, centred="covariance" in needs) if pairs else None
        self.sample = torch.empty(0, width, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        """Add the tokens x [..., in] of any floating dtype."""
        x = x.detach().reshape(-1, self.width).float()
        self.count += len(x)
        for part in (self.moments, self.gram):
            if part is not None:
                part.update(x)
        missing = SAMPLE_ROWS - len(self.sample)
        if missing > 0 and len(x):
            rows = x[:: max(1, len(x) // ROWS_PER_BATCH)][: min(missing, ROWS_PER_BATCH)]
            self.sample = torch.cat([self.sample, rows])

    def merge(self, other: InputStatistics) -> None:
        """Add everything that `other` has seen."""
        self.count += other.count
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram)
        self.sample = torch.cat([self.sample, other.sample])[:SAMPLE_ROWS]

    def all_reduce_(self) -> None:
        """Sum over the ranks; the sample stays this rank's own."""
        for part in (self.moments, self.gram):
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
        return all(part.finite() for part in (self.moments, self.gram) if part is not None) and bool(
            torch.isfinite(self.sample).all()
        )
