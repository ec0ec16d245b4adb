import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.factors.decompose import (
    CURVATURE_RIDGE,
    WHITENINGS,
    Metric,
    Spectrum,
    balance,
    damp,
    decompose,
    decompose_eigen,
    decompose_plain,
    truncate,
)
from rankship_pipeline.merge.grams import output_energy

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, rows: int, columns: int, samples: int) -> tuple[Tensor, Tensor]:
    """A weight and the rows of X that it sees, its columns scaled very unequally."""
    random = np.random.default_rng(seed)
    scales = 10.0 ** random.uniform(-2, 1, columns)
    return torch.tensor(random.normal(size=(rows, columns))), torch.tensor(
        random.normal(size=(samples, columns)) * scales
    )


@given(seeds, sizes, sizes, sizes)
def test_the_loss_of_a_rank_is_the_tail_of_the_whitened_spectrum(
    seed: int, rows: int, columns: int, samples: int
) -> None:
    """Fewer samples than columns make the Gram rank-deficient, which must not matter."""
    W, X = draw(seed, rows, columns, samples)
    spectrum = decompose_eigen(W, X.T @ X)
    whole = float((W @ X.T).square().sum())
    for rank in range(1, min(rows, columns) + 1):
        A, B = truncate(spectrum, rank)
        assert float(((W - A @ B) @ X.T).square().sum()) == pytest.approx(
            float(spectrum.energy[rank:].sum()), rel=1e-6, abs=1e-9 * whole
        )


@given(seeds, sizes, sizes, sizes)
def test_whitening_is_never_worse_than_plain_on_the_data(seed: int, rows: int, columns: int, samples: int) -> None:
    W, X = draw(seed, rows, columns, samples)
    gram = X.T @ X
    for rank in range(1, min(rows, columns) + 1):
        losses = {}
        for name, whiten in WHITENINGS.items():
            A, B = truncate(whiten(W, gram), rank)
            losses[name] = output_energy(W - A @ B, gram)
        for name in ("eigen", "cholesky", "swift"):
            assert losses[name] <= losses["plain"] * (1 + 1e-9) + 1e-9 * output_energy(W, gram), name


def test_whitening_is_truly_better_where_inputs_are_unequal() -> None:
    W, X = draw(0, 8, 8, 50)
    gram = X.T @ X
    plain, eigen = (truncate(WHITENINGS[name](W, gram), 2) for name in ("plain", "eigen"))
    assert output_energy(W - eigen[0] @ eigen[1], gram) < 0.7 * output_energy(W - plain[0] @ plain[1], gram)


@given(seeds, sizes, sizes)
def test_plain_truncation_is_the_best_in_the_frobenius_norm(seed: int, rows: int, columns: int) -> None:
    W, _ = draw(seed, rows, columns, 1)
    sigma = np.linalg.svd(W.numpy(), compute_uv=False)
    for rank in range(1, min(rows, columns) + 1):
        A, B = truncate(decompose_plain(W, None), rank)
        assert float((W - A @ B).norm()) == pytest.approx(float(np.linalg.norm(sigma[rank:])), abs=1e-9)


@pytest.mark.parametrize("name", sorted(WHITENINGS))
def test_a_spectrum_falls_and_gives_the_weight_back(name: str) -> None:
    W, X = draw(1, 5, 7, 40)
    spectrum = WHITENINGS[name](W, X.T @ X)
    assert (spectrum.sigma.diff() <= 0).all()
    torch.testing.assert_close((spectrum.U * spectrum.sigma) @ spectrum.right, W)
    torch.testing.assert_close(spectrum.energy, spectrum.sigma**2)


@pytest.mark.parametrize("name", sorted(WHITENINGS))
@pytest.mark.parametrize("samples", [3, 40])
def test_both_factors_of_a_component_have_one_norm(name: str, samples: int) -> None:
    W, X = draw(2, 6, 8, samples)
    A, B = truncate(WHITENINGS[name](W, X.T @ X), 6)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))


@pytest.mark.parametrize("name", sorted(WHITENINGS))
def test_a_rank_beyond_the_spectrum_is_filled_with_zeros(name: str) -> None:
    W, X = draw(3, 4, 6, 2)
    spectrum = WHITENINGS[name](W, X.T @ X)
    A, B = truncate(spectrum, 9)
    assert (A.shape, B.shape) == ((4, 9), (9, 6))
    available = len(spectrum.sigma)
    assert not A[:, available:].any()
    assert not B[available:].any()
    torch.testing.assert_close(A @ B @ X.T, W @ X.T)


def test_the_null_space_of_the_data_is_dropped() -> None:
    W, X = draw(4, 6, 8, 3)
    spectrum = decompose_eigen(W, X.T @ X)
    assert len(spectrum.sigma) == 3
    assert spectrum.right.abs().max() < 1e3  # no eigenvalue near zero was inverted


@pytest.mark.parametrize("gram", [torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), None])
def test_without_data_whitening_is_plain(gram: Tensor | None) -> None:
    W, _ = draw(5, 4, 3, 1)
    torch.testing.assert_close(decompose_eigen(W, gram).sigma, decompose_plain(W, None).sigma)


def test_a_weight_of_zeros_has_finite_factors() -> None:
    _, X = draw(6, 1, 5, 20)
    for whiten in WHITENINGS.values():
        A, B = truncate(whiten(torch.zeros(4, 5, dtype=torch.float64), X.T @ X), 2)
        assert A.isfinite().all()
        assert B.isfinite().all()
        assert not (A @ B).any()


def test_a_diagonal_case_worked_by_hand() -> None:
    """W = diag(3, 2, 1) on inputs of energy 1, 4 and 100: whitened σ = 10, 4, 3, so the third column comes first."""
    W, gram = torch.diag(torch.tensor([3.0, 2, 1]).double()), torch.diag(torch.tensor([1.0, 4, 100]).double())
    spectrum = decompose_eigen(W, gram)
    torch.testing.assert_close(spectrum.sigma, torch.tensor([10.0, 4, 3]).double())
    A, B = truncate(spectrum, 1)
    torch.testing.assert_close(A @ B, torch.diag(torch.tensor([0.0, 0, 1]).double()))
    plain = truncate(decompose_plain(W, gram), 1)
    torch.testing.assert_close(plain[0] @ plain[1], torch.diag(torch.tensor([3.0, 0, 0]).double()))


# --- the ways of whitening are one optimum -------------------------------------------------------------------------

EQUAL = ("cholesky", "eigen", "swift")


def draw_curvature(seed: int, rows: int, samples: int) -> Tensor:
    random = np.random.default_rng(seed + 1)
    Z = torch.tensor(random.normal(size=(samples, rows)) * 10.0 ** random.uniform(-1, 1, rows))
    return Z.T @ Z / samples


def weigh(change: Tensor, metric: Metric) -> float:
    """tr(H·Δ·G·Δᵀ) with the damped curvature, straight from its definition."""
    assert metric.gram is not None
    G = metric.gram.diag() if metric.gram.ndim == 1 else metric.gram
    H = torch.eye(len(change)).double()
    if metric.curvature is not None:
        H = damp(metric.curvature)
    return float(torch.trace(H @ change @ G @ change.T))


def list_losses(W: Tensor, spectrum: Spectrum, metric: Metric) -> list[float]:
    products = [truncate(spectrum, k) for k in range(1, min(W.shape) + 1)]
    return [weigh(W - A @ B, metric) for A, B in products]


@pytest.mark.parametrize("curved", [False, True])
@given(seed=seeds, rows=sizes, columns=sizes, samples=st.sampled_from([2, 5, 40]))
def test_cholesky_eigen_and_swift_lose_the_same_at_every_rank(
    seed: int, rows: int, columns: int, samples: int, *, curved: bool
) -> None:
    """Two or five samples leave the Gram without full rank: there Cholesky has to give way, and all must still work."""
    W, X = draw(seed, rows, columns, samples)
    metric = Metric(gram=X.T @ X, curvature=draw_curvature(seed, rows, 30) if curved else None)
    whole = weigh(W, metric)
    expected = list_losses(W, decompose(W, metric, "eigen"), metric)
    for name in EQUAL:
        losses = list_losses(W, decompose(W, metric, name), metric)
        assert losses == pytest.approx(expected, rel=1e-5, abs=1e-8 * whole), name


def test_cholesky_is_taken_where_it_exists_and_left_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fallen: list[Tensor] = []

    def watch(weight: Tensor, gram: Tensor) -> Spectrum:
        fallen.append(gram)
        return decompose_eigen(weight, gram)

    monkeypatch.setattr("rankship_pipeline.factors.decompose.decompose_eigen", watch)
    W, X = draw(0, 5, 6, 40)
    WHITENINGS["cholesky"](W, X.T @ X)
    assert not fallen
    for rows in (X[:3], X * torch.tensor([1, 1, 1, 1, 1, 0]), X[:, [0, 1, 2, 3, 4, 4]]):
        fallen.clear()
        spectrum = WHITENINGS["cholesky"](W, rows.T @ rows)
        assert fallen
        assert spectrum.right.abs().max() < 1e4


@pytest.mark.parametrize("name", sorted(WHITENINGS))
@pytest.mark.parametrize("blank", [False, True])
def test_a_diagonal_gram_is_the_same_as_the_full_matrix(name: str, *, blank: bool) -> None:
    W, X = draw(3, 5, 7, 30)
    diagonal = X.square().sum(0)
    diagonal[2] = 0 if blank else diagonal[2]
    thin, full = WHITENINGS[name](W, diagonal), WHITENINGS[name](W, diagonal.diag())
    torch.testing.assert_close(thin.sigma, full.sigma)
    for rank in range(1, 6):
        (A, B), (C, D) = truncate(thin, rank), truncate(full, rank)
        torch.testing.assert_close(A @ B, C @ D, rtol=1e-6, atol=1e-8)


@given(seeds, sizes, sizes, sizes, st.sampled_from([1, 30]))
def test_with_a_curvature_the_loss_of_a_rank_is_again_the_tail(
    seed: int, rows: int, columns: int, samples: int, moved: int
) -> None:
    """One moved direction leaves a curvature of rank 1, which its damping makes whole."""
    W, X = draw(seed, rows, columns, samples)
    metric = Metric(gram=X.T @ X, curvature=draw_curvature(seed, rows, moved))
    spectrum = decompose(W, metric, "eigen")
    tails = [float(spectrum.energy[k:].sum()) for k in range(1, min(W.shape) + 1)]
    assert list_losses(W, spectrum, metric) == pytest.approx(tails, rel=1e-6, abs=1e-9 * weigh(W, metric))


@given(seeds, st.integers(2, 7), st.integers(2, 7), st.floats(-4, 0))
def test_no_change_of_the_factors_lowers_the_curved_loss(seed: int, rows: int, columns: int, exponent: float) -> None:
    W, X = draw(seed, rows, columns, 30)
    metric = Metric(gram=X.T @ X, curvature=draw_curvature(seed, rows, 30))
    random = np.random.default_rng(seed)
    for rank in range(1, min(rows, columns)):
        A, B = truncate(decompose(W, metric, "eigen"), rank)
        best = weigh(W - A @ B, metric)
        for _ in range(4):
            dA, dB = (torch.tensor(random.normal(size=one.shape)) * one.norm() * 10.0**exponent for one in (A, B))
            assert weigh(W - (A + dA) @ (B + dB), metric) >= best - 1e-9 * weigh(W, metric)


def test_rank_goes_where_outputs_move_the_predictions() -> None:
    """The second output is the smaller one, and the one that matters."""
    W, gram = torch.diag(torch.tensor([3.0, 1]).double()), torch.eye(2).double()
    curvature = torch.diag(torch.tensor([1.0, 100]).double())
    for name in EQUAL:
        A, B = truncate(decompose(W, Metric(gram=gram, curvature=curvature), name), 1)
        torch.testing.assert_close(A @ B, torch.diag(torch.tensor([0.0, 1]).double()), atol=1e-9, rtol=0)


def test_damping_lifts_every_direction_by_its_own_size_and_nothing_at_all_is_the_identity() -> None:
    curvature = torch.diag(torch.tensor([2.0, 8, 0]).double())
    lifted = torch.tensor([2 * (1 + CURVATURE_RIDGE), 8 * (1 + CURVATURE_RIDGE), 4 * CURVATURE_RIDGE])
    torch.testing.assert_close(damp(curvature), torch.diag(lifted).double())
    torch.testing.assert_close(damp(torch.zeros(3, 3).double()), torch.eye(3).double())


@given(seeds, sizes, sizes, sizes)
def test_balancing_keeps_the_product_and_evens_the_norms(seed: int, rows: int, rank: int, columns: int) -> None:
    (A, B), random = draw(seed, rows, rank, columns), np.random.default_rng(seed)
    B = B.T * torch.tensor(10.0 ** random.uniform(-6, 6, (rank, 1)))
    A = A.clone()
    A[:, 0] = 0  # a dead component stays as it is
    left, right = balance(A, B)
    torch.testing.assert_close(left @ right, A @ B)
    torch.testing.assert_close(left.norm(dim=0)[1:], right.norm(dim=1)[1:])
    assert torch.equal(right[0], B[0])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
@pytest.mark.parametrize("curved", [False, True])
def test_a_large_weight_goes_by_its_smaller_side_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    curved: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (50, shape[1]), (50, shape[0]))
    W, X, Y = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    metric = Metric(gram=X.T @ X, curvature=Y.T @ Y if curved else None)
    exact = decompose(W, metric, "eigen")
    monkeypatch.setattr("rankship_pipeline.factors.decompose._SMALL", 3)
    monkeypatch.setattr("rankship_pipeline.factors.decompose.find_singular", None)  # not called
    found = decompose(W, metric, "swift")
    torch.testing.assert_close(found.sigma, exact.sigma)
    for rank in (2, 6):
        products = [A @ B for A, B in (truncate(one, rank) for one in (found, exact))]
        torch.testing.assert_close(products[0], products[1])
