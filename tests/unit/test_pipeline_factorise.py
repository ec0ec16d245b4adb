import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.factorise import WHITENINGS, decompose_eigen, decompose_plain, truncate
from rankship_pipeline.merge import output_energy

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
        for name, decompose in WHITENINGS.items():
            A, B = truncate(decompose(W, gram), rank)
            losses[name] = output_energy(W - A @ B, gram)
        assert losses["eigen"] <= losses["plain"] * (1 + 1e-9) + 1e-9 * output_energy(W, gram)


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


@pytest.mark.parametrize("gram", [torch.zeros(3, 3, dtype=torch.float64), None])
def test_without_data_whitening_is_plain(gram: Tensor | None) -> None:
    W, _ = draw(5, 4, 3, 1)
    torch.testing.assert_close(decompose_eigen(W, gram).sigma, decompose_plain(W, None).sigma)


def test_a_weight_of_zeros_has_finite_factors() -> None:
    _, X = draw(6, 1, 5, 20)
    for decompose in WHITENINGS.values():
        A, B = truncate(decompose(torch.zeros(4, 5, dtype=torch.float64), X.T @ X), 2)
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
