"""Second-moment matrix of a site's inputs, for criteria that look at pairs of features (SparseGPT).

Accumulated and factored in float32 with TF32 off. A factorisation that fails is repeated in float64 and
then with growing damping, which is reported; it never degrades to an identity matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmprune.collectives import summed_
from llmprune.errors import InputError

SMALLEST = 128
"""Width below which the lower half is computed too: splitting further costs more than it saves."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products in true float32 on CUDA, whatever the caller has allowed."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class Gram:
    """G = X^T X over all tokens fed to `update`.

    The matrix is symmetric, so only its upper half is accumulated, in squares that are as large as they can be.
    (numpy would call syrk for it, but its threads and torch's get in each other's way.)

    Attributes:
        count: number of tokens seen.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._upper = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._whole: Tensor | None = None
        self._factor: tuple[float, Tensor, float] | None = None  # damping asked for, U, damping used

    def update(self, x: Tensor) -> None:
        """Add the tokens x [n, in]."""
        self.count += len(x)
        self._whole = self._factor = None
        with full_float32():
            _add_upper_product(self._upper, x)

    def merge(self, other: Gram) -> None:
        """Add everything that `other` has seen."""
        self.count += other.count
        self._upper += other._upper
        self._whole = self._factor = None

    def all_reduce_(self) -> None:
        """Replace this rank's sum by that of all ranks; every rank ends with the same bits."""
        count = torch.tensor([self.count], device=self._upper.device)
        summed_(count)
        summed_(self._upper)
        self.count = int(count.item())
        self._whole = self._factor = None

    @property
    def matrix(self) -> Tensor:
        """[in, in] float32, symmetric; made when first asked for."""
        if self._whole is None:
            upper = self._upper.triu()
            self._whole = upper + upper.triu(1).T
        return self._whole

    @property
    def energy(self) -> Tensor:
        """[in], E[x^2], the diagonal of G / n."""
        return self._upper.diagonal() / max(self.count, 1)

    def finite(self) -> bool:
        """False if any token brought NaN or infinity."""
        return bool(torch.isfinite(self._upper).all())

    def inverse_factor(self, damping: float = 0.01) -> tuple[Tensor, float]:
        """U [in, in], upper, with U^T U = (H)^-1 for H = G + damping * mean(diag G) * I, and the damping used.

        Features that were never active get H_jj = 1 before damping. Computed once: sites that share an
        input share the factor. Source: arXiv 2301.00774.

        Raises:
            InputError: H stays indefinite at damping 1.
        """
        assert damping > 0
        if self._factor is None or self._factor[0] != damping:
            self._factor = (damping, *_inverse_factor(self.matrix, damping))
        return self._factor[1:]


def _add_upper_product(upper: Tensor, x: Tensor) -> None:
    """Add X^T X to `upper` [in, in] in place, at least from the diagonal on; x is [n, in]."""
    width = x.shape[1]
    if width <= SMALLEST:
        upper.addmm_(x.T, x)
        return
    half = width // 2
    _add_upper_product(upper[:half, :half], x[:, :half])
    _add_upper_product(upper[half:, half:], x[:, half:])
    upper[:half, half:].addmm_(x[:, :half].T, x[:, half:])


def _inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    attempts = [(torch.float32, damping)]
    while damping <= 1.0:
        attempts.append((torch.float64, damping))
        damping *= 10
    for dtype, damp in attempts:
        H = gram.to(dtype, copy=True)
        diagonal = H.diagonal()
        diagonal[diagonal == 0] = 1.0
        diagonal += damp * diagonal.mean()
        # With J the reversal, J H J = L L^T gives U = J L^-1 J: one factorisation and one triangular
        # inverse instead of two factorisations and a full inverse.
        with full_float32():
            L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
            if not failed:
                identity = torch.eye(len(H), dtype=dtype, device=H.device)
                U = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
                # An overflown Gram factors into zeros.
                if torch.isfinite(U).all() and (U.diagonal() > 0).all():
                    return U.float(), damp
    raise InputError(
        "the Gram matrix is not positive definite even with damping 1.0: the calibration activations are "
        "degenerate; use more or other calibration text, or a method without a Gram matrix (wanda, stade)"
    )
