"""What a rounded layer loses: measured, and estimated from a few measured points."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import approximate as approximate_float
from rankship_pipeline.factors.forms import keep_efficient, list_candidates
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Form, Stored
from rankship_pipeline.models.layers import Factorable, as_matrix, describe
from rankship_pipeline.quantise.basis import rotate, turn_link
from rankship_pipeline.quantise.chains import approximate, estimate_errors, measure_error

FORMS: tuple[Form, ...] = ("svd", "spatial", "tucker")
MODULES: list[Factorable] = [nn.Conv2d(12, 16, 3), nn.Linear(40, 64), nn.Embedding(90, 32)]


def take(module: Factorable) -> Decomposition:
    """A layer with a falling spectrum, under a Gram and a curvature that are no identities."""
    torch.manual_seed(0)
    layer, weight = describe("x", module), as_matrix(module)
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    weight = (U * sigma * 0.85 ** torch.arange(len(sigma))) @ Vh
    columns, rows = layer.columns, layer.rows
    if layer.kind == "embedding":
        gram = torch.rand(columns, dtype=torch.float64) + 0.01
    else:
        X = torch.randn(3 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
        gram = X.T @ X / len(X)
    H = torch.randn(3 * rows, rows, dtype=torch.float64)
    return Decomposition(layer, weight, Metric(gram=gram, curvature=H.T @ H), "eigen")


def list_of(taken: Decomposition, form: Form) -> tuple[Factors, ...]:
    return tuple(one.factors for one in keep_efficient(list_candidates(taken, 2, (form,))))


@pytest.mark.parametrize("module", MODULES, ids=lambda one: type(one).__name__)
def test_more_bits_lose_less_and_float32_loses_the_rank_alone(module: Factorable) -> None:
    taken = take(module)
    for factors in (None, *(list_of(taken, form)[-1] for form in FORMS if list_of(taken, form))):
        exact, eight, four = (
            measure_error(taken, Stored(factors=factors, weights=one)) for one in ("float32", "int8", "int4")
        )
        assert exact <= eight < four
        assert eight - exact < 0.02 * (four - exact)
        if factors is not None:
            assert torch.equal(approximate(taken, Stored(factors=factors)), approximate_float(taken, factors))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("module", MODULES, ids=lambda one: type(one).__name__)
def test_the_estimate_orders_all_ways_as_measuring_them_does(module: Factorable, weights: Precision) -> None:
    taken = take(module)
    estimated, measured = [], []
    for form in FORMS:
        some = keep_efficient(list_candidates(taken, 2, (form,)))
        estimated += estimate_errors(taken, some, weights)
        measured += [measure_error(taken, Stored(factors=one.factors, weights=weights)) for one in some]
    assert len(measured) > 8
    assert spearmanr(estimated, measured).statistic > 0.99
    assert max(abs(one / other - 1) for one, other in zip(estimated, measured, strict=True)) < 0.2


def test_a_rotated_link_computes_the_same() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    turn = rotate(6, first)
    turned, after = turn_link(first, second, turn)
    torch.testing.assert_close(after @ turned, second @ first)
    torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64))


def test_a_layer_whose_inputs_were_all_zero_is_rounded_too() -> None:
    taken = take(nn.Linear(40, 64))
    silent = Decomposition(taken.layer, taken.weight, Metric(gram=torch.zeros(40, 40).double()), "eigen")
    errors = [
        measure_error(silent, Stored(factors=Factors(rank=8), weights=one)) for one in ("float32", "int8", "int4")
    ]
    assert all(less < more for less, more in pairwise(errors))
