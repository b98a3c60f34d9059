"""What a site is to approximate: its own dense output on what it now receives, or the dense model's output."""

from __future__ import annotations

from torch import Tensor

from llmprune.gram import full_float32
from llmprune.sites import Site, Target

TARGETS = ("own", "dense")


def dense_target(site: Site, centred: bool, mix: float) -> tuple[Target, float]:
    """The linear map of the pruned model's inputs x that comes nearest to the dense model's outputs.

    With H = Cov(x, x), C = Cov(x_dense, x), R = W C and a damping D that pulls towards the dense weights,
    W_t = (R + W D) (H + D)^-1. Where the site's output joins the residual stream, R = Cov(t, x) with t its dense
    output and the error that the stream has gathered. Without a bias to move, second moments take the place of
    covariances. Derived from least squares; with x = x_dense it is W.

    Args:
        site: its statistics hold `gram` and `cross`.
        centred: True if the site's bias moves.
        mix: in [0, 1], how much of the dense model's output is in the target; the rest is the site's own.

    Returns:
        The map, and the damping used: the Gram matrix's `ridge` unless that was too little.

    Raises:
        InputError: the Gram matrix is degenerate.
    """
    assert site.statistics is not None
    gram, cross = site.statistics.gram, site.statistics.cross
    assert gram is not None and cross is not None
    own = site.weight.float()
    bias = 0.0 if site.bias is None else site.bias.float()
    U, damping = gram.inverse_factor(gram.ridge, centred)
    H = gram.matrix_of(centred)
    with full_float32():
        wanted = cross.matrix(centred, bias) if cross.of_output else own @ cross.matrix(centred)
        if mix < 1:
            wanted = mix * wanted + (1 - mix) * (own @ H)
        wanted = wanted + own * (gram.damped_diagonal(damping, centred) - H.diagonal())
        weight = wanted @ U.T @ U
        mean = cross.z_mean - bias if cross.of_output else own @ cross.z_mean
        if mix < 1:
            mean = mix * mean + (1 - mix) * (own @ cross.x_mean)
    return Target(weight, mean), damping


def wanted_output(site: Site) -> Tensor:
    """[rows, out] float32: what the dense model has for the site's sampled inputs, without the bias."""
    assert site.statistics is not None
    own, cross = site.weight.float(), site.statistics.cross
    if cross is None or site.target is None:
        return site.statistics.sample @ own.T
    if cross.of_output:
        return site.statistics.dense_sample - (0.0 if site.bias is None else site.bias.float())
    return site.statistics.dense_sample @ own.T
