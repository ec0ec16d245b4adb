"""Layers that are too wide for a Gram of their inputs, factored by that of their outputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric, make_metric, reduce_inputs
from rankship_pipeline.factors.forms import list_candidates, make_weights
from rankship_pipeline.factors.held_out import measure_held_out
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import find_layers


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 8)).eval()


def draw_inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator) * 0.3


@pytest.fixture(params=[False, True], ids=["flat", "curved"])
def both(request: pytest.FixtureRequest) -> tuple[Analysis, Analysis]:
    """The same layer by its inputs' Gram and by its outputs', unshrunk."""
    net, x = make_net(), draw_inputs().double()
    W = net.get_parameter("0.weight").detach().double()
    H = torch.randn(30, 8, dtype=torch.float64)
    curvature = torch.stack([H.T @ H] * 2) if request.param else None
    G = torch.stack([x.T @ x / 200] * 2)
    inner, outputs = reduce_inputs(W, W @ G @ W.T)
    narrow = replace(make_metric(outputs, curvature, 200, shrunk=False), inner=inner)
    metrics = make_metric(G, curvature, 200, shrunk=False), narrow
    first, second = (analyse(net, find_layers(net), {"0": metric}, "swift") for metric in metrics)
    return first, second


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_factors_and_errors_are_those_of_the_inputs_gram(both: tuple[Analysis, Analysis], rank: int) -> None:
    factors = Factors(rank=rank)
    products = []
    for analysis in both:
        first, second = make_weights(analysis.layers["0"], factors)
        assert (first.shape, second.shape) == ((rank, 40), (8, rank))
        products.append(second @ first)
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-5)
    errors = [[one.error for one in list_candidates(one.layers["0"], 1, ("svd", "tucker"))] for one in both]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4, abs=1e-9)


def test_a_wide_layer_of_full_rank_computes_what_it_did(both: tuple[Analysis, Analysis]) -> None:
    x = draw_inputs()
    compressed = fill(both[1], {"0": Factors(rank=8)})
    torch.testing.assert_close(compressed(x), make_net()(x), rtol=1e-3, atol=1e-3)


def test_few_samples_make_a_wide_layer_better_than_its_plain_svd() -> None:
    net, x = make_net(), draw_inputs().double()
    W, G = net.get_parameter("0.weight").detach().double(), x.T @ x / 200
    halves = torch.stack([x[:12].T @ x[:12] / 12, x[12:24].T @ x[12:24] / 12])
    inner, outputs = reduce_inputs(W, W @ halves @ W.T)
    metric = replace(make_metric(outputs, None, 24), inner=inner)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    plain = (U[:, :4] * sigma[:4]) @ Vh[:4]
    taken = analyse(net, find_layers(net), {"0": metric}, "swift").layers["0"]
    first, second = make_weights(taken, Factors(rank=4))
    lost = [float(torch.trace((W - one) @ G @ (W - one).T)) for one in (second @ first, plain)]
    assert lost[0] < lost[1]
    held = measure_held_out(taken, Factors(rank=4))
    assert held is not None
    assert 0 < held < 1


def test_without_a_metric_nothing_is_reduced() -> None:
    net = make_net()
    assert analyse(net, find_layers(net), {"0": Metric()}, "plain").layers["0"].outer is None
