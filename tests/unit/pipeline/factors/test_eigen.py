import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.factors.decompose import WHITENINGS, truncate
from rankship_pipeline.factors.eigen import find_cholesky, find_damped_cholesky, find_eigen, find_root, find_singular
from rankship_pipeline.foundation.errors import BuildError

FLOOR = 1e-10


def draw_gram(seed: int, columns: int, kind: str) -> Tensor:
    """A Gram (columns, columns) that is hard in one way."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(3 * columns, columns))
    if kind == "few rows":
        X = X[:2]
    elif kind == "zero columns":
        X[:, random.random(columns) < 0.8] = 0
    elif kind == "equal columns":
        X[:] = X[:, :1]
    elif kind == "badly scaled":
        X *= 10.0 ** random.uniform(-9, 9, columns)
    elif kind == "tiny":
        X *= 1e-150
    return torch.tensor(X.T @ X)


HARD = ["well", "few rows", "zero columns", "equal columns", "badly scaled", "tiny"]


@pytest.mark.parametrize("kind", HARD)
@given(seed=st.integers(0, 999), columns=st.integers(1, 12))
def test_a_root_gives_its_gram_back_in_the_units_of_each_column(kind: str, seed: int, columns: int) -> None:
    gram = draw_gram(seed, columns, kind)
    S, inverse = find_root(gram, FLOOR)
    if not bool(gram.any()):
        torch.testing.assert_close(S, torch.eye(columns, dtype=torch.float64))
        return
    scale = gram.diagonal().sqrt()
    error = (S @ S.T - gram) / (scale[:, None] * scale).clamp_min(1e-300)
    assert float(error.abs().max()) < 1e-8
    torch.testing.assert_close(inverse.T @ S, torch.eye(S.shape[1], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", HARD)
@given(seed=st.integers(0, 999), columns=st.integers(1, 10), rows=st.integers(1, 10))
def test_every_whitening_holds_the_whole_weight_on_the_inputs_whatever_the_gram(
    kind: str, seed: int, columns: int, rows: int
) -> None:
    gram = draw_gram(seed, columns, kind)
    W = torch.tensor(np.random.default_rng(seed).normal(size=(rows, columns)))
    whole = float(((W @ gram) * W).sum())
    for name, whiten in WHITENINGS.items():
        A, B = truncate(whiten(W, gram), min(rows, columns))
        change = W - A @ B
        assert A.isfinite().all(), name
        assert float(((change @ gram) * change).sum()) <= 1e-7 * whole + 1e-300, name


@given(st.integers(0, 999), st.floats(1e-6, 1e8))
def test_the_unit_of_one_input_changes_no_product(seed: int, unit: float) -> None:
    """An amount in cents beside 1e7 times smaller flags: the whitened SVD is that of the same function."""
    random = np.random.default_rng(seed)
    W, X = torch.tensor(random.normal(size=(6, 8))), torch.tensor(random.normal(size=(50, 8)))
    D = torch.ones(8, dtype=torch.float64)
    D[0] = unit
    for name in ("eigen", "cholesky", "swift"):
        (A, B), (C, E) = (truncate(WHITENINGS[name](W / s, (X * s).T @ (X * s)), 3) for s in (torch.ones_like(D), D))
        torch.testing.assert_close(C @ E * D, A @ B, rtol=1e-6, atol=1e-6)


def test_dependent_columns_have_no_cholesky_factor_and_small_ones_have() -> None:
    gram = draw_gram(0, 6, "well")
    small = torch.ones(6, dtype=torch.float64)
    small[2] = 1e-9
    L = find_cholesky(gram * small[:, None] * small, FLOOR)
    assert L is not None
    torch.testing.assert_close(L @ L.T, gram * small[:, None] * small)
    assert find_cholesky(draw_gram(0, 6, "equal columns"), FLOOR) is None
    assert find_cholesky(draw_gram(0, 6, "zero columns"), FLOOR) is None


def test_where_divide_and_conquer_fails_the_slower_way_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = draw_gram(1, 9, "few rows")
    values, Q = find_eigen(gram)
    U, sigma, Vh = find_singular(gram[:4])

    def fail(*_: object, **__: object) -> None:
        message = "the algorithm failed to converge"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    again, Q_again = find_eigen(gram)
    torch.testing.assert_close(again, values)
    torch.testing.assert_close((Q_again * again) @ Q_again.T, (Q * values) @ Q.T)
    U_again, sigma_again, Vh_again = find_singular(gram[:4])
    torch.testing.assert_close(sigma_again, sigma)
    torch.testing.assert_close((U_again * sigma_again) @ Vh_again, (U * sigma) @ Vh)


def test_both_ways_agree_on_a_gram_with_a_thousand_zero_rows() -> None:
    """A padded 3×3 convolution on maps of one pixel: only the kernel's centre ever sees anything."""
    random = np.random.default_rng(0)
    gram = torch.zeros(1152, 1152, dtype=torch.float64)
    X = torch.tensor(random.normal(size=(64, 128)))
    gram[4::9, 4::9] = X.T @ X
    S, _ = find_root(gram, FLOOR)
    torch.testing.assert_close(S @ S.T, gram, rtol=1e-8, atol=1e-8)
    assert S.shape[1] == 64
    torch.testing.assert_close(find_eigen(gram)[0], torch.tensor(scipy.linalg.eigvalsh(gram)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", HARD)
def test_a_damped_factor_exists_for_every_gram(kind: str) -> None:
    gram = draw_gram(3, 9, kind)
    L = find_damped_cholesky(gram, 1e-10)
    scale = gram.diagonal().sqrt()
    close = (L @ L.T - gram).abs() <= 1e-6 * scale[:, None] * scale + (0 if kind != "zero columns" else 1e-9)
    assert bool(close.all())


def test_a_matrix_that_rounding_made_indefinite_is_damped_more() -> None:
    gram = torch.ones(4, 4, dtype=torch.float64) - 1e-7 * torch.eye(4, dtype=torch.float64)  # an eigenvalue of -1e-7
    L = find_damped_cholesky(gram, 1e-10)
    torch.testing.assert_close(L @ L.T, gram, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = bad
    with pytest.raises(BuildError, match="not finite"):
        find_eigen(matrix)
    with pytest.raises(BuildError, match="not finite"):
        find_singular(matrix)
