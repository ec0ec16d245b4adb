"""Rounding one matrix: always on the grid, and better on the inputs that it was told of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.quantise.grid import is_on_grid
from rankship_pipeline.quantise.rounding import round_matrix

GRIDS: list[tuple[Precision, int | None]] = [("int8", None), ("int4", None), ("int4", 32)]


def make_gram(columns: int, samples: int) -> Tensor:
    mix = torch.randn(columns, columns, dtype=torch.float64)
    X = torch.randn(samples, columns, dtype=torch.float64) @ mix
    return X.T @ X / samples


def measure(change: Tensor, gram: Tensor) -> float:
    return float(((change @ gram) * change).sum())


@given(
    grid=st.sampled_from(GRIDS),
    rows=st.integers(1, 6),
    samples=st.integers(1, 80),
    heavy=st.floats(0, 30),
    seed=st.integers(0, 99),
)
def test_whatever_is_rounded_is_on_its_grid(
    grid: tuple[Precision, int | None], rows: int, samples: int, heavy: float, seed: int
) -> None:
    torch.manual_seed(seed)
    precision, block = grid
    matrix = torch.randn(rows, 64)
    matrix[0, 0] += heavy  # an outlier, which other columns' errors may not move off the grid's end
    matrix[-1, 32:] = 0
    for gram in (None, make_gram(64, samples), make_gram(64, samples).diagonal()):
        rounded = round_matrix(matrix, precision, gram, block)
        assert rounded.dtype == matrix.dtype
        assert is_on_grid(rounded, precision, block)
        again = round_matrix(rounded, precision, None, block)
        torch.testing.assert_close(again, rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "block"), GRIDS)
def test_rounding_by_the_inputs_loses_less_on_them(precision: Precision, block: int | None) -> None:
    torch.manual_seed(1)
    matrix, gram = torch.randn(24, 64, dtype=torch.float64), make_gram(64, 200)
    nearest = round_matrix(matrix, precision, None, block)
    found = round_matrix(matrix, precision, gram, block)
    assert measure(matrix - found, gram) < 0.7 * measure(matrix - nearest, gram)


def test_a_clip_is_chosen_where_an_outlier_costs_more_than_it_is_worth() -> None:
    torch.manual_seed(2)
    matrix = torch.randn(1, 256)
    matrix[0, 7] = 6.0
    rounded = round_matrix(matrix, "int4")
    whole = (matrix / (6 / 7)).round() * (6 / 7)
    assert float(rounded.abs().max()) < 6.0
    assert float((rounded - matrix).square().sum()) < float((whole - matrix).square().sum())
    important = torch.zeros(256)
    important[7] = 1.0
    assert float(round_matrix(matrix, "int4", important).abs().max()) == pytest.approx(6.0)


def test_more_columns_than_are_passed_on_at_once_are_rounded_alike() -> None:
    torch.manual_seed(3)
    matrix, gram = torch.randn(4, 300, dtype=torch.float64), make_gram(300, 900)
    found = round_matrix(matrix, "int4", gram)
    nearest = round_matrix(matrix, "int4")
    assert measure(matrix - found, gram) < 0.6 * measure(matrix - nearest, gram)
