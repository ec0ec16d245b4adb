"""Every form of a layer against its definition: what it costs, what it computes, and what it is said to lose."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from make.conv1ds import make_conv1d
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.decompose import Metric, damp
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import (
    FORMS,
    Candidate,
    approximate,
    compose,
    count_parameters,
    keep_efficient,
    list_candidates,
    list_operators,
    make_weights,
)
from rankship_pipeline.factors.rebuild import chain, fill_factors
from rankship_pipeline.foundation.records import Factors, Form
from rankship_pipeline.models.layers import Factorable, Layer, as_matrix, describe, find_layers, shape_weight
from rankship_pipeline.ranks.price import price_parameters

ALL = tuple(form for form in get_args(Form) if form != "width")  # of layers by themselves; see test_neurons.py
PRICE = price_parameters(0)
MODULES: dict[str, Callable[[], Factorable]] = {
    "3x3": lambda: nn.Conv2d(5, 7, 3),
    "3x3 strided": lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False),
    "3x3 dilated, same": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    "4x2 same": lambda: nn.Conv2d(4, 6, (4, 2), padding="same"),
    "5x3": lambda: nn.Conv2d(3, 8, (5, 3), stride=(2, 1), padding=(1, 2)),
    "1x3": lambda: nn.Conv2d(6, 5, (1, 3), padding=(0, 1)),
    "3x1": lambda: nn.Conv2d(6, 5, (3, 1), bias=False),
    "1x1": lambda: nn.Conv2d(6, 8, 1, stride=2),
    "linear": lambda: nn.Linear(9, 7),
    "linear without bias": lambda: nn.Linear(6, 10, bias=False),
    "5 over one axis": lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2),
    "3 over one axis, same": lambda: nn.Conv1d(5, 9, 3, dilation=2, padding="same", bias=False),
    "3x3 reflected": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
    "3 over one axis, circular": lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
    "3x3 transposed": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
    "4 over one axis, transposed": lambda: nn.ConvTranspose1d(7, 3, 4, stride=2, bias=False),
    "transformers' Conv1D": lambda: make_conv1d(9, 7),
    "embedding": lambda: nn.Embedding(12, 5, padding_idx=0),
}
KERNELS = [name for name in MODULES if "x" in name and name not in {"1x1", "3x3 transposed"}]


def make_module(name: str) -> tuple[Factorable, Layer]:
    torch.manual_seed(0)
    module = MODULES[name]()
    return module, describe("layer", module)


def draw_metric(layer: Layer, *, samples: int | None = None, seed: int = 1) -> Metric:
    """Inputs of unequal scale that hang together, and a curvature; fewer samples than columns leave a null space."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    n = layer.columns
    X = draw(samples or 4 * n, n) @ (torch.eye(n, dtype=torch.float64) + 0.3 * draw(n, n) / n**0.5)
    X *= torch.linspace(0.5, 2, n, dtype=torch.float64)
    Z = draw(4 * layer.rows, layer.rows) * torch.linspace(0.3, 3, layer.rows, dtype=torch.float64)
    gram = X.square().sum(0) if layer.kind == "embedding" else X.T @ X
    return Metric(gram=gram / len(X), curvature=Z.T @ Z / len(Z))


def measure_energy(matrix: Tensor, metric: Metric) -> float:
    """tr(H·Δ·G·Δᵀ), written out; the curvature damped."""
    G = torch.eye(matrix.shape[1]).double() if metric.gram is None else metric.gram
    G = G.diag() if G.ndim == 1 else G
    H = torch.eye(len(matrix)).double()
    if metric.curvature is not None:
        H = damp(metric.curvature)
    return float(torch.trace(H @ matrix @ G @ matrix.T))


def measure_error(taken: Decomposition, factors: Factors) -> float:
    left = taken.weight - approximate(taken, factors)
    return measure_energy(left, taken.metric) / measure_energy(taken.weight, taken.metric)


def take_apart(name: str, metric: Metric | None = None) -> Decomposition:
    module, layer = make_module(name)
    return Decomposition(layer, as_matrix(module), draw_metric(layer) if metric is None else metric, "eigen")


def list_some(layer: Layer) -> list[Factors]:
    """Small, middling and full ranks of every form that the layer can have, whether cheaper than dense or not."""
    full = min(layer.rows, layer.columns)
    found = [Factors(rank=k) for k in {1, full // 2, full}]
    height, width = layer.kernel
    if min(height, width) > 1:
        most = min(layer.channels * height, layer.rows * width)
        found += [Factors(form="spatial", rank=k) for k in (1, most // 2, most)]
    if max(height, width) > 1:
        pairs = ((1, 1), (layer.channels // 2, layer.rows // 2), (1, 4), (layer.channels, layer.rows))
        found += [Factors(form="tucker", input_rank=inner, rank=k) for inner, k in pairs]
    return found


def draw_input(module: Factorable) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.arange(12).reshape(3, 4)
    if not isinstance(module, nn.Linear) and hasattr(module, "kernel_size"):
        return torch.randn(3, module.in_channels, *(9, 8)[: len(module.kernel_size)])
    return torch.randn(2, describe("", module).columns)


def test_the_table_holds_every_form_that_records_name() -> None:
    assert tuple(FORMS) == get_args(Form)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("name", MODULES)
def test_what_is_measured_is_what_is_on_offer_the_smallest_first(name: str, form: Form) -> None:
    taken = take_apart(name)
    offered = list(FORMS[form].list_factors(taken.layer, 2))
    assert [factors for factors, _ in FORMS[form].measure_errors(taken, 2)] == offered
    assert all(one.form == form for one in offered)
    costs = [count_parameters(taken.layer, one) for one in offered]
    assert not costs or costs[0] == min(costs)


@pytest.mark.parametrize("name", MODULES)
def test_the_price_and_the_operators_are_those_of_the_chain(name: str) -> None:
    module, layer = make_module(name)
    for factors in list_some(layer):
        operators = list(chain(module, factors))
        sizes = {name: parameter.numel() for name, parameter in nn.Sequential(*operators).named_parameters()}
        assert count_parameters(layer, factors) == sum(n for key, n in sizes.items() if key.endswith("weight"))
        shapes = [tuple(as_matrix(one).shape) for one in operators if not isinstance(one, nn.Embedding)]  # type: ignore[arg-type]
        assert [one.shape for one in list_operators(layer, factors)] == shapes
        assert [one.bias is not None for one in operators if hasattr(one, "bias")][:-1] == [False] * (len(shapes) - 1)
    assert count_parameters(layer, None) == module.weight.numel()
    dense = [] if layer.kind == "embedding" else [(layer.rows, layer.columns)]
    assert [one.shape for one in list_operators(layer, None)] == dense


@pytest.mark.parametrize("name", MODULES)
def test_a_chain_computes_what_its_weights_multiply_out_to(name: str) -> None:
    module, layer = make_module(name)
    taken = take_apart(name)
    x = draw_input(module)
    for factors in list_some(layer):
        weights = make_weights(taken, factors)
        chained, dense = chain(module, factors), copy.deepcopy(module)
        fill_factors(chained, weights)
        dense.weight.data = shape_weight(compose(layer, factors, weights), module.weight, layer)
        torch.testing.assert_close(chained(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_the_full_rank_of_every_form_is_the_dense_layer(name: str) -> None:
    taken = take_apart(name)
    layer = taken.layer
    full = [Factors(rank=min(layer.rows, layer.columns))]
    if min(layer.kernel) > 1:
        full.append(Factors(form="spatial", rank=layer.channels * layer.kernel[0]))
    if max(layer.kernel) > 1:
        full.append(Factors(form="tucker", input_rank=layer.channels, rank=layer.rows))
    for factors in full:
        torch.testing.assert_close(approximate(taken, factors), taken.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("whitening", ["eigen", "cholesky", "swift"])
@pytest.mark.parametrize("name", MODULES)
def test_a_candidates_error_is_what_its_weights_lose(name: str, whitening: str) -> None:
    module, layer = make_module(name)
    taken = Decomposition(layer, as_matrix(module), draw_metric(layer), whitening)
    candidates = list_candidates(taken, 1, ALL)
    assert {one.factors.form for one in candidates} == set(ALL if min(layer.kernel) > 1 else ("svd",)) | (
        {"tucker"} if max(layer.kernel) > 1 else set()
    )
    for one in candidates[:: max(1, len(candidates) // 25)]:
        assert one.cost == count_parameters(layer, one.factors) < layer.parameters
        assert measure_error(taken, one.factors) == pytest.approx(one.error, rel=1e-6, abs=1e-9), one.factors


@pytest.mark.parametrize("metric", [Metric(), Metric(curvature=torch.diag(torch.linspace(0, 3, 7).double()))])
def test_what_the_metric_leaves_out_counts_as_the_identity(metric: Metric) -> None:
    taken = take_apart("3x3", metric)
    for one in list_candidates(taken, 2, ALL):
        assert measure_error(taken, one.factors) == pytest.approx(one.error, rel=1e-6, abs=1e-9), one.factors


@pytest.mark.parametrize("name", MODULES)
def test_an_svds_error_is_exact_on_inputs_that_span_less(name: str) -> None:
    module, layer = make_module(name)
    taken = Decomposition(layer, as_matrix(module), draw_metric(layer, samples=layer.columns // 2), "eigen")
    for one in list_candidates(taken, 1, ("svd",)):
        assert measure_error(taken, one.factors) == pytest.approx(one.error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("form", ["spatial", "tucker"])
def test_a_kernel_that_mostly_sees_padding_is_not_said_to_be_free(form: Form) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)).eval()
    (layer,) = find_layers(net)
    gram = collect_grams(net, (torch.randn(99, 8, 1, 1),), (layer,))["0"]  # only the kernel's centre ever sees anything
    taken = Decomposition(layer, as_matrix(net[0]), Metric(gram=gram), "eigen")  # type: ignore[arg-type]
    for one in list_candidates(taken, 1, (form,)):
        assert measure_error(taken, one.factors) == pytest.approx(one.error, rel=1e-4, abs=1e-6), one.factors


@pytest.mark.parametrize("samples", [2, 200])
def test_inputs_that_hang_together_are_no_obstacle(samples: int) -> None:
    """Thirty-two channels made of five: the Gram's null space holds float32 noise of either sign."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 24, 3, padding=1)).eval()
    (layer,) = find_layers(net)
    mix = torch.randn(32, 5, generator=generator) * torch.logspace(-3, 2, 32)[:, None]
    x = torch.einsum("co,nohw->nchw", mix, torch.randn(samples, 5, 6, 6, generator=generator) + 3)
    gram = collect_grams(net, (x,), (layer,))["0"]
    taken = Decomposition(layer, as_matrix(net[0]), Metric(gram=gram), "eigen")  # type: ignore[arg-type]
    candidates = list_candidates(taken, 8, ALL)
    for one in candidates[::3]:
        assert measure_error(taken, one.factors) == pytest.approx(one.error, rel=1e-2, abs=1e-5), one.factors


def test_without_data_every_form_is_judged_as_without_a_gram() -> None:
    blind = list_candidates(take_apart("3x3", Metric(gram=torch.zeros(45, 45).double())), 2, ALL)
    plain = list_candidates(take_apart("3x3", Metric()), 2, ALL)
    assert [one.factors for one in blind] == [one.factors for one in plain]
    assert [one.error for one in blind] == pytest.approx([one.error for one in plain], abs=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_errors_fall_as_a_width_grows_and_no_form_beats_svd_at_its_rank(name: str) -> None:
    taken = take_apart(name)
    errors = {one.factors: one.error for one in list_candidates(taken, 1, ALL)}
    for factors, error in errors.items():
        smaller = [
            other
            for other in errors
            if other.form == factors.form and other.rank <= factors.rank
            if (other.input_rank or 0) <= (factors.input_rank or 0)
        ]
        assert all(error <= errors[other] + 1e-9 for other in smaller), factors
        bound = errors.get(Factors(rank=factors.rank))  # a Tucker-2 of rank r2 is a matrix of that rank at best
        assert factors.form == "spatial" or bound is None or error >= bound - 1e-9


@pytest.mark.parametrize("name", KERNELS)
def test_everything_behind_the_first_operator_is_the_best_that_there_is(name: str) -> None:
    """No change to the operators that follow lowers the loss, given the first."""
    taken = take_apart(name)
    generator = torch.Generator().manual_seed(5)
    for factors in list_some(taken.layer)[3:]:
        weights = make_weights(taken, factors)
        best = measure_energy(taken.weight - compose(taken.layer, factors, weights), taken.metric)
        for place in range(1, len(weights)):
            for scale in (1e-3, 0.1):
                changed = list(weights)
                noise = torch.randn(weights[place].shape, generator=generator, dtype=torch.float64)
                for sign in (1, -1):
                    changed[place] = weights[place] + sign * scale * noise
                    loss = measure_energy(taken.weight - compose(taken.layer, factors, changed), taken.metric)
                    assert loss >= best * (1 - 1e-9) - 1e-12


@pytest.mark.parametrize("name", KERNELS)
def test_the_first_operator_and_the_next_have_one_norm_in_every_channel(name: str) -> None:
    taken = take_apart(name)
    for factors in list_some(taken.layer):
        first, second = make_weights(taken, factors)[:2]
        following = second.transpose(0, 1) if second.ndim > 2 else second.T
        torch.testing.assert_close(first.flatten(1).norm(dim=1), following.flatten(1).norm(dim=1))


layers = st.builds(
    lambda rows, channels, kernel: Layer(
        name="l", rows=rows, columns=channels * kernel[0] * kernel[1], kind="convolution", kernel=kernel
    ),
    st.integers(1, 12),
    st.integers(1, 10),
    st.sampled_from([(1, 1), (3, 1), (1, 2), (2, 2), (3, 3)]),
)
offered = st.sampled_from([("svd",), ("svd", "spatial"), ("svd", "tucker"), ALL])


def list_prices(layer: Layer, step: int, forms: tuple[Form, ...]) -> list[int]:
    weight = torch.ones(layer.rows, layer.columns, dtype=torch.float64)
    candidates = list_candidates(Decomposition(layer, weight, Metric(), "plain"), step, forms)
    return [one.cost for one in candidates]


@settings(max_examples=60)
@given(layers, st.integers(1, 3), offered)
def test_the_smallest_is_the_cheapest_that_is_offered_or_dense(
    layer: Layer, step: int, forms: tuple[Form, ...]
) -> None:
    assert PRICE.find_least(layer, step, forms) == min([layer.parameters, *list_prices(layer, step, forms)])


def test_a_step_wider_than_the_layer_is_not_counted() -> None:
    layer = describe("l", nn.Conv2d(64, 4, 3))
    assert PRICE.find_least(layer, 8, ALL) == min([layer.parameters, *list_prices(layer, 8, ALL)])


def test_a_layer_that_no_form_fits_is_at_least_dense() -> None:
    assert PRICE.find_least(describe("l", nn.Linear(4, 5)), 1, ("spatial", "tucker")) == 20


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])), max_size=12))
def test_what_is_kept_is_exactly_what_nothing_beats(drawn: list[tuple[int, float]]) -> None:
    candidates = [Candidate(Factors(rank=place), cost, error) for place, (cost, error) in enumerate(drawn)]
    kept = keep_efficient(candidates)
    assert set(kept) <= set(candidates)
    assert all(a.cost < b.cost and a.error > b.error for a, b in pairwise(kept))
    for one in candidates:
        assert any(other.cost <= one.cost and other.error <= one.error for other in kept)
