"""The formulas of the methods, transcribed slowly and literally in float64: what the package is compared with.

Nothing here is vectorised or shared with the package; masks are chosen by sorting Python tuples.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.inputs import InputStatistics
from llmprune.patterns import Pattern, parse_pattern
from llmprune.sites import Site

Matrix = np.ndarray
LAYOUTS = ("linear", "conv1d", "expert", "expert_transposed")
CASES = [("unstructured", "0.5", 63), ("row", "0.29", 68), ("matrix", "0.7", 132), ("unstructured", "0.29", 260),
         ("2:4", "", 68), ("1:4", "", 132), ("4:8", "", 264), ("3:4", "", 260)]  # fmt: skip
"""Pattern, sparsity or "", and inputs of a site; only n:m needs a width that m divides."""


def f64(tensor: Tensor) -> Matrix:
    """A float64 copy."""
    return tensor.detach().double().numpy().copy()


def count(size: int, sparsity: str) -> int:
    """floor(size * sparsity), in exact arithmetic on the decimal that a user would type."""
    return int(size * Fraction(sparsity))


def keep_of_list(scores: list[float], prune: int) -> list[bool]:
    """Sort by (score, index) and prune the first."""
    order = sorted(range(len(scores)), key=lambda j: (scores[j], j))
    gone = set(order[:prune])
    return [j not in gone for j in range(len(scores))]


def keep_rows(scores: Matrix, prune: int) -> Matrix:
    """bool [out, in]: `prune` of every row go."""
    return np.array([keep_of_list(list(row), prune) for row in scores])


def keep_matrix(scores: Matrix, prune: int) -> Matrix:
    """bool [out, in]: `prune` of the whole matrix, read row by row, go."""
    return np.array(keep_of_list(list(scores.flatten()), prune)).reshape(scores.shape)


def keep_nm(scores: Matrix, n: int, m: int) -> Matrix:
    """bool [out, in]: n of every m consecutive inputs stay."""
    keep = np.zeros(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for a in range(0, scores.shape[1], m):
            keep[row, a : a + m] = keep_of_list(list(scores[row, a : a + m]), m - n)
    return keep


def make_pattern(text: str, sparsity: str) -> Pattern:
    """One of CASES as the package knows it."""
    return parse_pattern(text, float(sparsity) if sparsity else None)


def literal_keep(scores: Matrix, text: str, sparsity: str, default: str) -> Matrix:
    """bool [out, in] of one of CASES; `default` is the criterion's own group."""
    if ":" in text:
        n, m = map(int, text.split(":"))
        return keep_nm(scores, n, m)
    if (default if text == "unstructured" else text) == "row":
        return keep_rows(scores, count(scores.shape[1], sparsity))
    return keep_matrix(scores, count(scores.size, sparsity))


def wanda(W: Matrix, X: Matrix) -> Matrix:
    """|W_ij| sqrt(E[x_j^2])."""
    return np.array([[abs(w) * np.sqrt(np.mean(X[:, j] ** 2)) for j, w in enumerate(row)] for row in W])


def stade(W: Matrix, X: Matrix) -> Matrix:
    """W_ij^2 Var(x_j)."""
    return np.array([[w**2 * np.var(X[:, j], ddof=1) for j, w in enumerate(row)] for row in W])


def stade_bias(W: Matrix, X: Matrix, keep: Matrix) -> Matrix:
    """sum over the pruned j of W_ij E[x_j], from the dense W."""
    shift = np.zeros(len(W))
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            if not keep[i, j]:
                shift[i] += W[i, j] * np.mean(X[:, j])
    return shift


def ria(W: Matrix, X: Matrix) -> Matrix:
    """(|W_ij| / column sum + |W_ij| / row sum) * sqrt(root mean square of x_j); empty rows and columns score 0."""
    scores = np.zeros(W.shape)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            if W[i, j]:
                size = abs(W[i, j])
                relative = size / np.abs(W[:, j]).sum() + size / np.abs(W[i]).sum()
                scores[i, j] = relative * np.mean(X[:, j] ** 2) ** 0.25
    return scores


def damped(X: Matrix, damp: float = 0.01) -> Matrix:
    """H = X^T X with 1 on the diagonal of features that were never active, plus damp * mean diagonal."""
    H = X.T @ X
    for j in range(len(H)):
        if H[j, j] == 0:
            H[j, j] = 1.0
    return H + damp * np.mean(np.diag(H)) * np.eye(len(H))


def row_by_row(H: Matrix, goal: Matrix, keep: Matrix) -> Matrix:
    """The best weights on a support: H_SS w_S = (H goal)_S, one row after the other."""
    solved = np.zeros_like(goal)
    for i, row in enumerate(keep):
        S = np.flatnonzero(row)
        if len(S):
            solved[i, S] = np.linalg.solve(H[np.ix_(S, S)], (H @ goal[i])[S])
    return solved


def sparsegpt(W: Matrix, X: Matrix, sparsity: str = "0", n: int = 0, m: int = 0, B: int = 128,
              damp: float = 0.01) -> tuple[Matrix, Matrix]:  # fmt: skip
    """Column by column as in arXiv 2301.00774, pruning exactly k of every block of B columns; weights and mask."""
    W = W.copy()
    d_out, d_in = W.shape
    W[:, np.all(X == 0, axis=0)] = 0.0
    U = np.linalg.cholesky(np.linalg.inv(damped(X, damp))).T  # H^-1 = U^T U
    keep = np.ones_like(W, dtype=bool)
    for a in range(0, d_in, B):
        b = min(a + B, d_in)
        E = np.zeros((d_out, b - a))
        if not m:
            keep[:, a:b] = keep_matrix(W[:, a:b] ** 2 / np.diag(U)[a:b] ** 2, count(d_out * (b - a), sparsity))
        for j in range(a, b):
            if m and j % m == 0:
                keep[:, j : j + m] = keep_nm(W[:, j : j + m] ** 2 / np.diag(U)[j : j + m] ** 2, n, m)
            e = np.where(keep[:, j], 0.0, W[:, j]) / U[j, j]
            W[:, j:b] -= np.outer(e, U[j, j:b])
            W[~keep[:, j], j] = 0.0
            E[:, j - a] = e
        W[:, b:] -= E @ U[a:b, b:]
    return W * keep, keep


def mse(change: Matrix, X: Matrix, shift: Matrix | float = 0.0) -> float:
    """Mean over tokens and outputs of (change x + shift)^2."""
    return float(np.mean((X @ change.T + shift) ** 2))


def inputs(tokens: int, width: int, seed: int = 0, mean: float = 0.5, correlated: bool = True) -> Tensor:
    """Rows [tokens, width] with means, uneven sizes and, where asked, correlations, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    if correlated:
        rank = max(width // 4, 1)
        common = torch.randn(tokens, rank, generator=generator)
        x = x + common @ torch.randn(rank, width, generator=generator) / rank**0.5
    sizes = torch.exp(0.5 * torch.randn(width, generator=generator))
    return (x + mean * torch.randn(width, generator=generator)) * sizes


def weights(out: int, width: int, seed: int = 0) -> Tensor:
    """[out, in], normally distributed."""
    return torch.randn(out, width, generator=torch.Generator().manual_seed(1000 + seed))


class Experts(nn.Module):
    """The shape of a fused expert parameter, with biases or without."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(weight)
        self.down_proj_bias = None if bias is None else nn.Parameter(bias)


BOTH = frozenset({"moments", "gram"})


def make_site(W: Tensor, x: Tensor | None = None, *, bias: Tensor | None = None, layout: str = "linear",
              name: str = "block.down_proj", needs: frozenset[str] = BOTH) -> Site:  # fmt: skip
    """A site that holds W [out, in] in one of LAYOUTS, and has seen the rows x [n, in]."""
    out, width = W.shape
    if layout.startswith("expert"):
        transposed = layout == "expert_transposed"
        other = torch.full_like(W, 7.0)  # the neighbour must stay as it is
        both = torch.stack([other, W])
        biases = None if bias is None else torch.stack([torch.full_like(bias, 7.0), bias])
        owner: nn.Module = Experts(both.transpose(1, 2).contiguous() if transposed else both, biases)
        site = Site(f"{name}.1", owner, "down_proj", 1, transposed)
    elif layout == "conv1d":
        owner = Conv1D(out, width).to(W.dtype)
        owner.weight.data.copy_(W.T)
        owner.bias = None if bias is None else nn.Parameter(bias.clone())
        site = Site(name, owner, "weight", transposed=True)
    else:
        owner = nn.Linear(width, out, bias=bias is not None, dtype=W.dtype)
        owner.weight.data.copy_(W)
        if bias is not None:
            owner.bias.data.copy_(bias)
        site = Site(name, owner, "weight")
    if x is not None:
        site.statistics = InputStatistics(width, needs)
        site.statistics.update(x)
    return site
