"""Second-moment matrix of a site's inputs, for what looks at pairs of features (SparseGPT, least squares).

Accumulated and factored in float32 with TF32 off. A factorisation that fails is repeated in float64 and
then with growing damping, which is reported; it never degrades to an identity matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmprune.collectives import gathered, summed_
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
    """Second moments of all tokens fed to `update`: G = X^T X, or with the mean taken out, C = G - n mean mean^T.

    The matrix is symmetric, so only its upper half is accumulated, in squares that are as large as they can be.
    (numpy would call syrk for it, but its threads and torch's get in each other's way.) Where C is wanted, the
    tokens are first moved by the mean of the first batch: C from G alone would cancel on features with a large mean.

    Attributes:
        count: number of tokens seen.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", *, centred: bool = False) -> None:
        self.count = 0
        self._centred = centred
        self._upper = torch.zeros(width, width, dtype=torch.float32, device=device)  # of x - origin
        self._sum = torch.zeros(width, dtype=torch.float32, device=device)  # of x - origin; only where centred
        self._origin = torch.zeros(width, dtype=torch.float32, device=device)
        self._forget()

    def _forget(self) -> None:
        self._whole: dict[bool, Tensor] = {}
        self._factor: dict[tuple[float, bool], tuple[Tensor, float]] = {}  # by damping asked for and centring

    def update(self, x: Tensor) -> None:
        """Add the tokens x [n, in]."""
        if self._centred and len(x):
            if self.count == 0:
                self._origin = x.mean(0)
            x = x - self._origin
            self._sum += x.sum(0)
        self.count += len(x)
        self._forget()
        with full_float32():
            _add_upper_product(self._upper, x)

    def merge(self, other: Gram) -> None:
        """Add everything that `other` has seen."""
        if self.count == 0:
            self._origin = other._origin
        moved = other._upper, other._sum
        if other._centred:
            moved = other._around(self._origin)
        self.count += other.count
        self._upper += moved[0]
        self._sum += moved[1]
        self._forget()

    def _around(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """The upper half and the sum as they would be had the tokens been moved by `origin` [in]."""
        shift = self._origin - origin
        cross = torch.outer(shift, self._sum)
        return (
            self._upper + cross + cross.T + self.count * torch.outer(shift, shift),
            self._sum + self.count * shift,
        )

    def all_reduce_(self) -> None:
        """Replace this rank's sum by that of all ranks; every rank ends with the same bits."""
        count = torch.tensor([self.count], device=self._upper.device)
        counts = gathered(count)
        summed_(count)
        if self._centred and len(counts) > 1:
            total = max(int(count.item()), 1)
            origin = sum((o * (c / total) for o, c in zip(gathered(self._origin), counts, strict=True)), self._sum * 0)
            self._upper, self._sum = self._around(origin)
            self._origin = origin
            summed_(self._sum)
        summed_(self._upper)
        self.count = int(count.item())
        self._forget()

    def matrix_of(self, centred: bool) -> Tensor:
        """[in, in] float32, symmetric: C or G; made when first asked for."""
        if centred not in self._whole:
            if not centred:
                upper, _ = self._around(torch.zeros_like(self._origin)) if self._centred else (self._upper, None)
            else:
                assert self._centred, "the mean was not taken out while the tokens were there"
                upper = self._upper - torch.outer(self._sum, self._sum / max(self.count, 1))
            self._whole[centred] = upper.triu() + upper.triu(1).T
        return self._whole[centred]

    @property
    def matrix(self) -> Tensor:
        """[in, in] float32, G."""
        return self.matrix_of(centred=False)

    @property
    def mean(self) -> Tensor:
        """[in], only where centred."""
        assert self._centred
        return self._origin + self._sum / max(self.count, 1)

    @property
    def energy(self) -> Tensor:
        """[in], E[x^2]."""
        if not self._centred:
            return self._upper.diagonal() / max(self.count, 1)
        return self.variance * (max(self.count - 1, 1) / max(self.count, 1)) + self.mean.square()

    @property
    def variance(self) -> Tensor:
        """[in], with n - 1; only where centred."""
        assert self._centred
        around_mean = self._upper.diagonal() - self._sum.square() / max(self.count, 1)
        return around_mean.clamp(min=0) / max(self.count - 1, 1)

    def finite(self) -> bool:
        """False if any token brought NaN or infinity."""
        return bool(torch.isfinite(self._upper).all())

    def damped(self, damping: float = 0.01, centred: bool = False) -> Tensor:
        """[in, in], a new matrix: C or G with 1 on the diagonal of dead features, plus damping * mean(diagonal) * I."""
        return _damped(self.matrix_of(centred), damping)

    def damped_diagonal(self, damping: float = 0.01, centred: bool = False) -> Tensor:
        """[in], the diagonal of `damped`."""
        return _damped_diagonal(self.matrix_of(centred), damping)

    @property
    def ridge(self) -> float:
        """The damping of a regression: 0.01, and `in` tokens more, on which the dense weights are right.

        With few tokens a row's weights would otherwise fit what is particular to them.
        """
        return 0.01 + len(self._upper) / max(self.count, 1)

    def inverse_factor(self, damping: float = 0.01, centred: bool = False) -> tuple[Tensor, float]:
        """U [in, in], upper, with U^T U = H^-1 for the damped H, and the damping used.

        Features that were never active get H_jj = 1 before damping. Computed once: sites that share an
        input share the factor. Source: arXiv 2301.00774.

        Raises:
            InputError: H stays indefinite at damping 1.
        """
        assert damping > 0
        key = damping, centred
        if key not in self._factor:
            self._factor[key] = _inverse_factor(self.matrix_of(centred), damping)
        return self._factor[key]


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


def _damped(gram: Tensor, damping: float) -> Tensor:
    H = gram.clone()
    H.diagonal().copy_(_damped_diagonal(gram, damping))
    return H


def _damped_diagonal(gram: Tensor, damping: float) -> Tensor:
    diagonal = gram.diagonal().clone()
    diagonal[diagonal <= 0] = 1.0  # never active, or centred never different
    return diagonal + damping * diagonal.mean()


def _inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    attempts = [(torch.float32, damping)]
    while damping <= 1.0:
        attempts.append((torch.float64, damping))
        damping *= 10
    for dtype, damp in attempts:
        H = _damped(gram.to(dtype), damp)
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
