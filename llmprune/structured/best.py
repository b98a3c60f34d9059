"""The best state that a learning run has passed through since its set was fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Best:
    """Least loss over all windows so far, and what it was found with.

    Attributes:
        loss: infinity until there is one.
        tensors: copies, by name.
    """

    loss: float = math.inf
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, loss: float, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state if it is better than all before."""
        if not loss >= self.loss:  # so that there is one even where the loss is no number
            self.loss, self.tensors = loss, {name: value.clone() for name, value in tensors.items()}
