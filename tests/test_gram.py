"""The second-moment matrix and the factor of its inverse, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from literal import damped, f64, inputs
from torch import Tensor
from torch.testing import assert_close

from llmprune.errors import InputError
from llmprune.gram import Gram, full_float32


def seen(*parts: Tensor) -> Gram:
    gram = Gram(parts[0].shape[1])
    for part in parts:
        gram.update(part)
    return gram


def assert_factor(U: Tensor, H: np.ndarray, tolerance: float) -> None:
    """U is upper and U^T U H = I, in float64, relative to how far H is from the identity."""
    assert_close(U, U.triu(), rtol=0, atol=0)
    u = f64(U)
    scale = np.sqrt(np.outer(np.diag(H), 1 / np.diag(H)))  # undo the features' sizes: H_ij ~ sqrt(H_ii H_jj)
    assert np.abs((u.T @ u @ H) * scale.T - np.eye(len(H))).max() < tolerance
    assert np.diag(u).min() > 0


@pytest.mark.parametrize("width", [1, 63, 68, 132, 260, 1030])
def test_the_matrix_is_the_sum_of_products(width: int) -> None:
    x = inputs(150, width, seed=width)
    gram = seen(*x.split(64))
    expected = x.double().T @ x.double()
    size = expected.diagonal().sqrt()
    assert gram.count == 150
    assert torch.equal(gram.matrix, gram.matrix.T)
    assert float(((gram.matrix.double() - expected) / torch.outer(size, size)).abs().max()) < 1e-6
    assert_close(gram.energy.double(), x.double().square().mean(0), rtol=1e-5, atol=0)


def test_the_matrix_follows_later_tokens_and_merges() -> None:
    x = inputs(120, 68)
    gram = seen(x[:50])
    first = gram.matrix.clone()
    gram.update(x[50:80])
    gram.merge(seen(x[80:]))
    gram.merge(Gram(68))
    gram.update(x[:0])
    assert gram.count == 120 and not torch.equal(first, gram.matrix)
    assert_close(gram.matrix.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [1, 63, 68, 132, 260])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_factor_is_that_of_the_damped_inverse(width: int, damping: float) -> None:
    x = inputs(4 * width, width, seed=width)
    U, used = seen(x).inverse_factor(damping)
    assert used == damping
    assert_factor(U, damped(f64(x), damping), 1e-3)


def test_features_that_were_never_active_count_as_one() -> None:
    x = inputs(300, 68)
    x[:, [0, 5, 67]] = 0.0
    U, used = seen(x).inverse_factor()
    H = damped(f64(x))
    assert used == 0.01
    assert_factor(U, H, 1e-3)
    for dead in (0, 5, 67):
        assert U[dead, dead].item() == pytest.approx(H[dead, dead] ** -0.5, rel=1e-5)
        assert int(U[dead].count_nonzero()) == 1 and int(U[:, dead].count_nonzero()) == 1


def test_an_input_of_zeros_only_gives_a_scaled_identity_because_h_is_one() -> None:
    U, used = seen(torch.zeros(10, 6)).inverse_factor()
    assert used == 0.01
    assert_close(U, torch.eye(6) / 1.01**0.5)


def test_fewer_tokens_than_features_is_what_damping_is_for() -> None:
    x = inputs(20, 132)
    U, used = seen(x).inverse_factor()
    assert used == 0.01
    assert_factor(U, damped(f64(x)), 1e-2)


def centred(*parts: Tensor) -> Gram:
    gram = Gram(parts[0].shape[1], centred=True)
    for part in parts:
        gram.update(part)
    return gram


def assert_centred(gram: Gram, x: Tensor, tolerance: float = 1e-4) -> None:
    """Against numpy in float64, relative to the features' sizes."""
    X = f64(x)
    around = X - X.mean(0)
    size = np.sqrt(np.diag(around.T @ around))
    assert np.abs((f64(gram.matrix_of(centred=True)) - around.T @ around) / np.outer(size, size)).max() < tolerance
    whole = np.sqrt(np.diag(X.T @ X))
    assert np.abs((f64(gram.matrix) - X.T @ X) / np.outer(whole, whole)).max() < tolerance
    assert np.allclose(f64(gram.mean), X.mean(0), rtol=1e-5, atol=1e-5)
    assert np.allclose(f64(gram.variance), X.var(0, ddof=1), rtol=1e-3)
    assert np.allclose(f64(gram.energy), (X**2).mean(0), rtol=1e-4)
    assert gram.count == len(X)


@pytest.mark.parametrize("width", [1, 63, 132, 260])
@pytest.mark.parametrize("size", [17, 64, 1000])
def test_with_the_mean_taken_out(width: int, size: int) -> None:
    x = inputs(150, width, seed=width, mean=3.0)
    assert_centred(centred(*x.split(size)), x)


def test_a_large_mean_does_not_drown_the_covariance() -> None:
    x = inputs(400, 68) + 3000 * torch.randn(68)
    gram = centred(*x.split(50))
    assert_centred(gram, x, tolerance=2e-3)
    U, used = gram.inverse_factor(centred=True)
    assert used == 0.01
    assert_factor(U, damped(f64(x) - f64(x).mean(0)), 2e-2)


def test_centred_parts_merge_in_any_order() -> None:
    x = inputs(150, 68, mean=3.0)
    parts = [centred(*part.split(20)) for part in x.split(50)]
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Gram(68, centred=True)
        for i in order:
            total.merge(parts[i])
        total.merge(Gram(68, centred=True))
        assert_centred(total, x)


def test_damping_leaves_the_statistics_alone() -> None:
    x = inputs(300, 63)
    x[:, 5] = 0.0
    gram = centred(x)
    for out_of, X in ((False, f64(x)), (True, f64(x) - f64(x).mean(0))):
        assert np.allclose(f64(gram.damped(0.1, out_of)), damped(X, 0.1), rtol=1e-3, atol=1e-2)
        assert gram.matrix_of(out_of)[5, 5] == 0


def test_the_factor_is_kept_but_never_stale() -> None:
    x = inputs(300, 63)
    gram = seen(x[:200])
    first, _ = gram.inverse_factor()
    assert gram.inverse_factor()[0] is first
    other, used = gram.inverse_factor(0.5)
    assert used == 0.5
    assert_factor(other, damped(f64(x[:200]), 0.5), 1e-3)
    gram.update(x[200:250])
    assert_factor(gram.inverse_factor()[0], damped(f64(x[:250])), 1e-3)
    gram.merge(seen(x[250:]))
    assert_factor(gram.inverse_factor()[0], damped(f64(x)), 1e-3)


def test_what_float32_cannot_factor_float64_can_at_the_same_damping() -> None:
    x = torch.ones(8, 68)  # rank one in whole numbers: 1e-9 of the diagonal is lost in float32 only
    U, used = seen(x).inverse_factor(1e-9)
    assert used == 1e-9
    a, delta = 8.0, 8e-9  # H = a 1 1^T + delta I; U_jj^-2 is what is left of H_jj given the k later features
    left = [delta + a * delta / (delta + a * k) for k in reversed(range(68))]
    assert np.allclose(np.diag(f64(U)), np.array(left) ** -0.5, rtol=1e-4)


def test_damping_grows_until_the_matrix_is_definite_and_is_reported() -> None:
    rows = torch.randn(3, 260)
    x = rows[torch.randint(0, 3, (4000,))] * 1.7  # rank three, with float32 rounding of either sign
    U, used = seen(*x.split(333)).inverse_factor(1e-10)
    powers = np.log10(used / 1e-10)
    assert powers > 0 and powers == pytest.approx(round(powers), abs=1e-6)
    assert used <= 1e-4  # the first that works: rounding is a millionth of the matrix, its norm 260 diagonals
    H = f64(seen(*x.split(333)).matrix)
    H += used * np.mean(np.diag(H)) * np.eye(260)
    u = f64(U)
    assert np.abs(u @ H @ u.T - np.eye(260)).max() < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_hopeless_matrix_is_an_error_and_never_an_identity(bad: float) -> None:
    x = inputs(100, 12)
    x[3, 4] = bad
    with pytest.raises(InputError, match="not positive definite"):
        seen(x).inverse_factor()


def test_tf32_is_off_inside_and_the_setting_put_back_after_an_error() -> None:
    settings = torch.backends.cuda.matmul
    before, inside = settings.allow_tf32, []

    @full_float32()
    def fails() -> None:
        inside.append(settings.allow_tf32)
        raise ZeroDivisionError

    settings.allow_tf32 = True
    try:
        with pytest.raises(ZeroDivisionError):
            fails()
        assert inside == [False] and settings.allow_tf32
    finally:
        settings.allow_tf32 = before
