from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.factors.decompose import Metric, decompose, decompose_outputs, make_metric, truncate
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.held_out import measure_held_out
from rankship_pipeline.factors.shrink import (
    _scale,
    _weigh_by_probes,
    _weigh_exactly,
    pool,
    shrink,
    shrink_curvature,
    shrink_outputs,
)
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Layer

COLUMNS, ROWS = 24, 16


def draw_inputs(random: np.random.Generator, samples: int, mixing: Tensor) -> Tensor:
    """Samples (samples, columns) with the covariance mixing·mixingᵀ."""
    return torch.tensor(random.normal(size=(samples, len(mixing)))) @ mixing.T


def draw_mixing(random: np.random.Generator, columns: int = COLUMNS) -> Tensor:
    """A covariance's root with a falling spectrum in a random basis, and columns of unequal size."""
    Q = torch.linalg.qr(torch.tensor(random.normal(size=(columns, columns))))[0]
    mixing: Tensor = (
        Q * torch.tensor(0.7 ** np.arange(columns)) * torch.tensor(2.0 ** random.uniform(-1, 1, (columns, 1)))
    )
    return mixing


def halve(X: Tensor) -> Tensor:
    return torch.stack([x.T @ x / max(1, len(x)) for x in (X[::2], X[1::2])])


def lose(W: Tensor, metric: Metric, whitening: str, rank: int, true: Tensor) -> float:
    """The share of the output energy on all inputs that a rank loses."""
    A, B = truncate(decompose(W, metric, whitening), rank)
    change = W - A @ B
    return float(((change @ true) * change).sum() / ((W @ true) * W).sum())


@pytest.mark.parametrize("samples", [1, 2, 4, 8, 16, 64, 1000])
def test_no_number_of_samples_ends_worse_than_plain_or_than_the_raw_gram(samples: int) -> None:
    losses: dict[str, list[float]] = {"plain": [], "raw": [], "shrunk": []}
    for seed in range(20):
        random = np.random.default_rng(seed)
        mixing, W = draw_mixing(random), torch.tensor(random.normal(size=(ROWS, COLUMNS)))
        X = draw_inputs(random, samples, mixing)
        halves = halve_any(X)
        metrics = {"plain": Metric(), "raw": Metric(gram=pool(halves)), "shrunk": make_metric(halves, None, samples)}
        for name, metric in metrics.items():
            losses[name].append(lose(W, metric, "plain" if name == "plain" else "eigen", 5, mixing @ mixing.T))
    plain, raw, shrunk = (float(np.mean(losses[name])) for name in ("plain", "raw", "shrunk"))
    assert shrunk <= plain * 1.001
    assert shrunk <= raw * 1.1


@given(st.integers(0, 99), st.integers(2, 60))
def test_a_shrunk_gram_is_positive_definite_and_keeps_its_mean_energy(seed: int, samples: int) -> None:
    random = np.random.default_rng(seed)
    halves = halve(draw_inputs(random, samples, draw_mixing(random)))
    shrunk = shrink(halves, samples)
    assert 0 <= shrunk.intensity <= 1
    assert 0 <= shrunk.doubt.evened <= 1
    torch.testing.assert_close(shrunk.matrix.diagonal().mean(), pool(halves).diagonal().mean())
    scale = shrunk.matrix.diagonal().rsqrt()
    assert float(torch.linalg.eigvalsh(shrunk.matrix * scale[:, None] * scale).min()) >= 0.5 * shrunk.intensity


def test_one_sample_says_nothing_and_many_samples_say_all() -> None:
    random = np.random.default_rng(0)
    mixing = draw_mixing(random)
    x = draw_inputs(random, 1, mixing)
    alone = shrink(torch.stack([2 * x.T @ x, 0 * x.T @ x]), 1)
    assert alone.intensity == 1
    assert not bool((alone.matrix - alone.matrix.diagonal().diag()).any())
    halves = halve(draw_inputs(random, 100_000, mixing))
    many = shrink(halves, 100_000)
    assert many.intensity < 1e-3
    torch.testing.assert_close(many.matrix, pool(halves), rtol=0.02, atol=1e-3)


def test_a_curvature_whose_halves_disagree_becomes_the_identity() -> None:
    """One sample near a decision makes up one half, another the other."""
    random = np.random.default_rng(3)
    x, y = (torch.tensor(random.normal(size=(1, COLUMNS))) for _ in range(2))
    torch.testing.assert_close(
        *(one / one[0, 0] for one in (shrink_curvature(torch.stack([x.T @ x, 1e-4 * y.T @ y]), 8), torch.eye(COLUMNS))),
        check_dtype=False,
        rtol=0,
        atol=0.1,
    )
    agreed = halve(draw_inputs(random, 100_000, draw_mixing(random)))
    torch.testing.assert_close(shrink_curvature(agreed, 100_000), pool(agreed), rtol=0.05, atol=5e-3)


def test_the_unit_of_a_column_only_scales_its_row_and_column() -> None:
    random = np.random.default_rng(1)
    X = draw_inputs(random, 40, torch.eye(COLUMNS).double())
    unit = torch.ones(COLUMNS, dtype=torch.float64)
    unit[3] = 1e7
    one, other = (shrink(halve(X * scale), 40) for scale in (torch.ones_like(unit), unit))
    assert one.intensity == pytest.approx(other.intensity, rel=1e-9)
    back = other.matrix / unit[:, None] / unit
    apart = (back.diagonal() / one.matrix.diagonal()).log()
    assert float(apart.std()) < 0.5  # of logarithms that reach 32


def test_a_column_never_seen_counts_a_little() -> None:
    random = np.random.default_rng(2)
    X = draw_inputs(random, 30, torch.eye(COLUMNS).double())
    X[:, :5] = 0
    energies = shrink(halve(X), 30).matrix.diagonal()
    assert bool((energies[:5] > 0).all())
    assert float(energies[:5].max()) < 0.1 * float(energies[5:].min())


def test_token_frequencies_keep_their_order() -> None:
    counts = torch.tensor([[9.0, 3.1, 0.1, 0.1], [7, 2.1, 1.1, 0.1]]).double()
    evened = shrink(counts, 12).matrix
    assert list(evened.argsort(descending=True))[:2] == [0, 1]
    torch.testing.assert_close(evened.mean(), pool(counts).mean())


@pytest.mark.parametrize("form", ["svd"])
@pytest.mark.parametrize("samples", [6, 12, 40, 400])
def test_the_loss_on_unseen_samples_is_the_true_one_and_not_the_one_that_was_fitted(form: str, samples: int) -> None:
    """Averaged over twenty draws: from few samples the raw Gram promises far too much."""
    held, fitted, true = [], [], []
    factors = Factors(form=form, rank=6)  # type: ignore[arg-type]
    for seed in range(20):
        random = np.random.default_rng(seed)
        mixing, W = draw_mixing(random), torch.tensor(random.normal(size=(ROWS, COLUMNS)))
        halves = halve(draw_inputs(random, samples, mixing))
        taken = Decomposition(
            Layer(name="x", rows=ROWS, columns=COLUMNS), W, make_metric(halves, None, samples), "eigen"
        )
        raw = replace(taken, metric=Metric(gram=pool(halves)))
        held.append(measure_held_out(taken, factors) or 0.0)
        fitted.append(lose(W, raw.metric, "eigen", 6, pool(halves)))
        true.append(lose(W, taken.metric, "eigen", 6, mixing @ mixing.T))
    measured, promised, real = (float(np.mean(one)) for one in (held, fitted, true))
    assert 0.9 * real <= measured <= 2 * real + 0.01
    if samples <= 12:
        assert promised < 0.5 * real


def test_without_halves_there_is_no_held_out_loss() -> None:
    W = torch.ones(ROWS, COLUMNS, dtype=torch.float64)
    layer, x = Layer(name="x", rows=ROWS, columns=COLUMNS), torch.ones(1, COLUMNS, dtype=torch.float64)
    one = make_metric(torch.stack([2 * x.T @ x, 0 * x.T @ x]), None, 1)
    for metric in (Metric(), Metric(gram=x.T @ x), one):
        assert measure_held_out(Decomposition(layer, W, metric, "eigen"), Factors(rank=2)) is None


def halve_any(X: Tensor) -> Tensor:
    return halve(X) if len(X) > 1 else torch.stack([2 * X.T @ X, 0 * X.T @ X])


def halve_outputs(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """The Grams of the outputs (2, rows, rows) and the energies of the inputs (2, columns) of two halves."""
    halves = halve_any(X)
    return W @ halves @ W.T, halves.diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("samples", [1, 2, 4, 8, 16, 64, 1000])
def test_no_number_of_samples_ends_worse_by_outputs_than_plain_or_by_inputs(samples: int) -> None:
    losses: dict[str, list[float]] = {"plain": [], "inputs": [], "outputs": []}
    for seed in range(20):
        random = np.random.default_rng(seed)
        mixing, W = draw_mixing(random), torch.tensor(random.normal(size=(ROWS, COLUMNS)))
        X, true = draw_inputs(random, samples, mixing), mixing @ mixing.T
        losses["plain"].append(lose(W, Metric(), "plain", 5, true))
        losses["inputs"].append(lose(W, make_metric(halve_any(X), None, samples), "eigen", 5, true))
        A, B = truncate(decompose_outputs(W, shrink_outputs(W, *halve_outputs(W, X), samples)[0]), 5)
        losses["outputs"].append(float((((W - A @ B) @ true) * (W - A @ B)).sum() / ((W @ true) * W).sum()))
    plain, inputs, outputs = (float(np.mean(losses[name])) for name in losses)
    assert outputs <= plain * 1.001
    assert outputs == pytest.approx(inputs, rel=0.1)


def test_outputs_are_shrunk_towards_those_of_inputs_without_correlations() -> None:
    random = np.random.default_rng(3)
    W = torch.tensor(random.normal(size=(ROWS, COLUMNS)))
    one, none = shrink_outputs(W, *halve_outputs(W, draw_inputs(random, 1, draw_mixing(random))), 1)
    assert none == 1
    root = torch.linalg.cholesky(one)  # of full rank
    assert float(root.diagonal().min()) > 0
    X = draw_inputs(random, 4000, draw_mixing(random))
    X[:, 3] = 0  # never seen: counts, a little
    outputs, energies = halve_outputs(W, X)
    many, share = shrink_outputs(W, outputs, energies, 4000)
    assert share < 0.01
    torch.testing.assert_close(many, pool(outputs), rtol=0, atol=0.01 * float(pool(outputs).diagonal().max()))
    silent = torch.zeros(COLUMNS, dtype=torch.float64)
    silent[3] = 1
    only = (W * silent) @ W.T
    assert float((many - pool(outputs) + share * pool(outputs)).mul(only).sum()) > 0


def test_outputs_that_depend_on_each_other_or_are_silent_can_be_shrunk() -> None:
    random = np.random.default_rng(4)
    W = torch.tensor(random.normal(size=(ROWS, COLUMNS)))
    W[1], W[2] = W[0], 0
    for X in (draw_inputs(random, 6, draw_mixing(random)), torch.zeros(6, COLUMNS, dtype=torch.float64)):
        matrix, share = shrink_outputs(W, *halve_outputs(W, X), 6)
        assert 0 <= share <= 1
        assert bool(matrix.isfinite().all())
        assert bool(matrix[2].eq(0).all())
        assert float(matrix.diagonal().sum()) > 0


@pytest.mark.parametrize("samples", [60, 400, 4000])
def test_likelihoods_of_many_columns_are_estimated_near_the_exact_ones(samples: int) -> None:
    random = np.random.default_rng(5)
    columns = 300
    Q = torch.linalg.qr(torch.tensor(random.normal(size=(columns, columns))))[0]
    mixing = Q * torch.tensor(0.98 ** np.arange(columns))
    halves = halve(draw_inputs(random, samples, mixing).relu())
    first, second = (_scale(half, pool(halves).diagonal()) for half in halves)
    exact = _weigh_exactly(first, second)
    estimated = _weigh_by_probes(first, second)
    assert abs(int(exact.argmin()) - int(estimated.argmin())) <= 1  # of 61, a tenth of a decade each
