"""Layers with one long side, factored by what is seen at the other: as with both."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.factors import decompose
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric, fit_metric
from rankship_pipeline.factors.forms import list_candidates, make_weights
from rankship_pipeline.factors.held_out import measure_held_out
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import find_layers

SHAPES = {"wide": (40, 8), "wide curved": (40, 8), "tall curved": (8, 40)}


def make_net(name: str = "wide") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*SHAPES[name])).eval()


def draw_inputs(name: str = "wide") -> Tensor:
    generator, columns = torch.Generator().manual_seed(1), SHAPES[name][0]
    alone = torch.randn(200, columns, generator=generator)
    return alone @ torch.randn(columns, columns, generator=generator) * 0.3


def reduce(W: Tensor, G: Tensor, H: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is collected of the layer: at its outputs if it is wide, at its inputs if it is tall."""
    if W.shape[0] < W.shape[1]:
        return W @ G @ W.T, H
    return G, None if H is None else W.T @ H @ W


@pytest.fixture(params=SHAPES)
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Analysis, Analysis]:
    """The same layer by both its sides' matrices and by the smaller one's, unshrunk and without a ridge."""
    monkeypatch.setattr(decompose, "CURVATURE_RIDGE", 0.0)
    net, x = make_net(request.param), draw_inputs(request.param).double()
    W = net.get_parameter("0.weight").detach().double()
    gradients = torch.randn(2, 90, len(W), dtype=torch.float64)
    H = gradients.transpose(1, 2) @ gradients if "curved" in request.param else None
    G = torch.stack([x.T @ x / 200] * 2)
    metrics = (fit_metric(W, *one, 200, shrunk=False) for one in ((G, H), reduce(W, G, H)))
    first, second = (analyse(net, find_layers(net), {"0": metric}, "swift") for metric in metrics)
    assert first.layers["0"].outer is None
    assert second.layers["0"].weight.shape == (8, 8)
    return first, second


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_factors_and_errors_are_those_of_both_sides(both: tuple[Analysis, Analysis], rank: int) -> None:
    factors, products = Factors(rank=rank), []
    rows, columns = both[0].layers["0"].weight.shape
    for analysis in both:
        first, second = make_weights(analysis.layers["0"], factors)
        assert (first.shape, second.shape) == ((rank, columns), (rows, rank))
        products.append(second @ first)
    torch.testing.assert_close(products[1], products[0], rtol=1e-4, atol=1e-5)
    errors = [[one.error for one in list_candidates(one.layers["0"], 1, ("svd", "tucker"))] for one in both]
    assert errors[1] == pytest.approx(errors[0], rel=1e-5, abs=1e-9)
    assert both[1].layers["0"].total == pytest.approx(both[0].layers["0"].total, rel=1e-5)


def test_a_reduced_layer_of_full_rank_computes_what_it_did(both: tuple[Analysis, Analysis]) -> None:
    net = both[1].model
    x = torch.randn(5, both[0].layers["0"].weight.shape[1])
    compressed = fill(both[1], {"0": Factors(rank=8)})
    torch.testing.assert_close(compressed(x), net(x), rtol=1e-3, atol=1e-3)
    taken = both[1].layers["0"]
    torch.testing.assert_close(taken.restore(taken.weight).float(), net.get_parameter("0.weight").detach())


@pytest.mark.parametrize("name", ["wide", "tall curved"])
def test_few_samples_make_a_reduced_layer_better_than_its_plain_svd(name: str) -> None:
    net, x = make_net(name), draw_inputs(name).double()
    W, G = net.get_parameter("0.weight").detach().double(), x.T @ x / 200
    gradients = torch.randn(400, len(W), dtype=torch.float64) @ torch.randn(len(W), len(W), dtype=torch.float64)
    H = gradients.T @ gradients / 400 if "curved" in name else torch.eye(len(W), dtype=torch.float64)
    seen, drawn = (torch.stack([one[:12].T @ one[:12], one[12:24].T @ one[12:24]]) / 12 for one in (x, gradients))
    metric = fit_metric(W, *reduce(W, seen, drawn if "curved" in name else None), 24)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    plain = (U[:, :4] * sigma[:4]) @ Vh[:4]
    taken = analyse(net, find_layers(net), {"0": metric}, "swift").layers["0"]
    first, second = make_weights(taken, Factors(rank=4))
    lost = [float(torch.trace(H @ (W - one) @ G @ (W - one).T)) for one in (second @ first, plain)]
    assert lost[0] < lost[1]
    held = measure_held_out(taken, Factors(rank=4))
    assert held is not None
    assert 0 < held < 1


def test_without_a_metric_nothing_is_reduced() -> None:
    net = make_net()
    assert analyse(net, find_layers(net), {"0": Metric()}, "plain").layers["0"].outer is None
