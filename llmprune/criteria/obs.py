"""Optimal brain surgeon on whole units: remove the one whose loss the others can best make up for, again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.criteria.base import Criterion
from llmprune.errors import InputError
from llmprune.gram import Gram, full_float32
from llmprune.patterns import Columns, Pattern, Uniform
from llmprune.sites import Site

DAMPING = 0.01


class OBS(Criterion):
    """Greedy removal of units from an output projection, with the survivors re-solved after each.

    With P = (G + damping)^-1 and the weights W solved for what is left, removing unit u costs
    tr(W_u (P_uu)^-1 W_u^T); then W -= W_u (P_uu)^-1 P_u, P -= P_:u (P_uu)^-1 P_u:. A unit's score is when it goes.
    Optimal brain surgeon (Hassibi and Stork, 1993) in blocks; where a bias moves, the covariance is G.
    """

    name = "obs"
    summary = "greedy removal of units by what the re-solved survivors cannot make up for"
    source = "optimal brain surgeon in blocks, this project"
    needs = frozenset({"gram"})
    pattern = "uniform"

    def check(self, pattern: Pattern) -> None:
        """Whole units only: for single weights there is SparseGPT."""
        if not isinstance(pattern, Uniform):
            raise InputError(
                f"obs removes whole units, and pattern {pattern} is about single weights: use --pattern uniform, or "
                "--method sparsegpt"
            )

    def score(self, site: Site) -> Tensor:
        """[out, in]: the step at which a column's unit is removed."""
        assert site.statistics is not None and site.statistics.gram is not None and isinstance(site.pattern, Columns)
        steps = removal_steps(site.goal, site.statistics.gram, site.pattern.size, self.compensates(site))
        return steps.repeat_interleave(site.pattern.size).expand(site.shape)


def removal_steps(weight: Tensor, gram: Gram, size: int, centred: bool = False) -> Tensor:
    """[in / size]: the step at which each unit of `size` columns is removed from a weight [out, in], float32."""
    U, _ = gram.inverse_factor(DAMPING, centred)
    with full_float32():
        order = removal_order(weight, U.T @ U, size)
    steps = torch.empty(len(order), device=order.device)
    steps[order] = torch.arange(len(order), dtype=steps.dtype, device=order.device)
    return steps


def removal_order(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """The units, long [in / size], in the order in which they are removed.

    Args:
        weight: [out, in] float32.
        inverse: [in, in] float32, of the damped second moments of the inputs.
        size: columns of a unit.
    """
    W, P = weight.clone(), inverse.clone()
    units = W.shape[1] // size
    gone = torch.zeros(units, dtype=torch.bool, device=W.device)
    order = []
    for _ in range(units):
        blocks = P.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        blocks[gone] = torch.eye(size, device=W.device)
        solved = torch.linalg.solve(blocks, W.view(-1, units, size).permute(1, 2, 0))  # [units, size, out]
        cost = (solved * W.view(-1, units, size).permute(1, 2, 0)).sum((1, 2)).masked_fill(gone, torch.inf)
        unit = int(cost.argmin())
        order.append(unit)
        gone[unit] = True
        columns = slice(unit * size, (unit + 1) * size)
        eliminated = torch.linalg.solve(P[columns, columns], P[columns])  # [size, in]
        W -= W[:, columns].clone() @ eliminated
        P -= P[:, columns].clone() @ eliminated
        W[:, columns], P[:, columns], P[columns] = 0.0, 0.0, 0.0
    return torch.tensor(order, device=W.device)
