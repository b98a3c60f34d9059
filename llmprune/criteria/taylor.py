"""First-order Taylor: how much the loss would change, by its gradient at a gate on each unit."""

from __future__ import annotations

from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.errors import InputError
from llmprune.patterns import Columns, Pattern, Uniform
from llmprune.sites import Site
from llmprune.structured.distillation import Distillation
from llmprune.structured.gates import Gates, frozen, gradients
from llmprune.structured.task import LearningOptions, Task


class Taylor(Criterion):
    """S_u = mean over windows of (dL / dm_u)^2 at m = 1: the loss that closing gate u would cost, to first order.

    L is the cross-entropy of a window, m_u a gate on unit u. Source: arXiv 1906.10771, there for weights and neurons.
    """

    name = "taylor"
    summary = "squared gradient of the loss at a gate on each unit"
    source = "Molchanov et al., arXiv 1906.10771"
    pattern = "uniform"

    def __init__(self, seed: int = 0, compensation: str | None = None) -> None:
        """As for every method."""
        super().__init__(seed, compensation)
        self._scores: Gates | None = None

    def check(self, pattern: Pattern) -> None:
        """Whole units only."""
        if not isinstance(pattern, Uniform):
            raise InputError(
                f"taylor scores whole units, and pattern {pattern} is about weights: use --pattern uniform"
            )

    def prepare(self, task: Task) -> None:
        """One pass forward and back over the windows."""
        with frozen(task.model, task.device) as device:
            gates = Gates(task.blocks, device)
            scores = Gates(task.blocks, device)
            loss = Distillation(task.model, gates, kl=0.0, ce=1.0)
            for path in scores.values:
                scores.values[path].zero_()
            for window in task.windows.split(1):
                for path, gradient in gradients(gates, loss, window, 1)[1].items():
                    scores.values[path] += gradient.square() / len(task.windows)
        self._scores = scores

    def learning_passes(self, options: LearningOptions) -> float:
        """Forward and back."""
        return 3.0

    def score(self, site: Site) -> Tensor:
        """[out, in], the same for all weights of a unit."""
        assert self._scores is not None and isinstance(site.pattern, Columns)
        each = self._scores.of_site(site.name).to(site.weight.device)
        return each.repeat_interleave(site.pattern.size).expand(site.shape)
