"""Regression: every choice that lowers the error of the pruned layer against the dense model, together."""

from __future__ import annotations

from llmprune.criteria.stade import Stade


class Regress(Stade):
    """STADE's score on the weights that best map the pruned model's inputs to the dense model's outputs.

    S_ij = W_t,ij^2 Var(x_j), the mask refined by exchanges, the survivors solved for, the mean moved into the
    bias; site after site, so that each makes up for what those before it have lost. No paper: STADE (arXiv
    2503.22451) is the case of one pruned weight, no regression and inputs of the dense model.
    """

    name = "regress"
    summary = "the dense model's output regressed on the pruned model's inputs"
    source = "least squares with STADE's bias, this project"
    compensation = "least-squares"
    refine = "swap"
    sequential = "site"
    target = "dense"
