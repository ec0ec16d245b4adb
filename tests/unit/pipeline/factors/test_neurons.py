"""Neurons in order compute the same, and leaving out the last costs what is predicted."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from make.conv1ds import make_conv1d
from rankship_pipeline.evaluate.calibrate import collect_halves
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric, fit_metric
from rankship_pipeline.factors.forms import list_candidates
from rankship_pipeline.factors.held_out import measure_held_out
from rankship_pipeline.factors.neurons import order_neurons
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Layer, as_matrix, count_parameters, find_layers, get_layer
from rankship_pipeline.quantise.chains import measure_error
from rankship_pipeline.quantise.in_order import round_layers
from rankship_pipeline.recover.reconstruct import reconstruct

NEURONS = 24
X = (torch.randn(300, 10, generator=torch.Generator().manual_seed(1)),)


class Gated(nn.Module):
    """Two layers that make neurons together, one with biases, and one that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(10, NEURONS), nn.Linear(10, NEURONS, bias=False)
        self.down, self.head = nn.Linear(NEURONS, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + self.down(functional.silu(self.gate(x)) * self.up(x)))
        return logits


class Plain(nn.Module):
    """One layer that makes neurons, stored with its inputs first, and one that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = make_conv1d(10, NEURONS), make_conv1d(NEURONS, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def mark(net: nn.Module) -> tuple[Layer, ...]:
    feeders = ("gate", "up") if isinstance(net, Gated) else ("up",)
    return tuple(
        replace(one, fed_by=feeders if one.name == "down" else (), feeds="down" if one.name in feeders else None)
        for one in find_layers(net)
    )


def take_apart(net: nn.Module, *, curved: bool = True, shrunk: bool = True) -> Analysis:
    layers = mark(net)
    grams = collect_halves(collect_grams, net, X, layers)
    curvatures = collect_halves(collect_curvatures, net, X, layers) if curved else {}
    metrics = {
        one.name: fit_metric(
            as_matrix(get_layer(net, one.name)), grams[one.name], curvatures.get(one.name), len(X[0]), shrunk=shrunk
        )
        for one in layers
    }
    return analyse(net, layers, metrics, "swift")


def make_net(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net


def narrow(net: nn.Module, kept: int) -> dict[str, Factors]:
    rows = as_matrix(get_layer(net, "down")).shape[0]
    made = {name: Factors(form="width", rank=kept) for name in ("gate", "up") if hasattr(net, name)}
    return {**made, "down": Factors(form="width", rank=rows, input_rank=kept)}


@pytest.mark.parametrize("kind", [Gated, Plain])
def test_neurons_in_order_compute_the_same(kind: type[nn.Module]) -> None:
    net = make_net(kind)
    before = copy.deepcopy(net.state_dict())
    analysis = take_apart(net)
    torch.testing.assert_close(analysis.model(*X), net(*X))
    assert not torch.equal(get_layer(analysis.model, "up").weight, get_layer(net, "up").weight)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", [Gated, Plain])
def test_the_predicted_error_is_what_the_reader_then_loses(kind: type[nn.Module]) -> None:
    net = make_net(kind)
    analysis = take_apart(net, curved=False, shrunk=False)
    taken = analysis.layers["down"]
    offers = list_candidates(taken, 3, ("width",))
    assert [one.factors.input_rank for one in offers] == list(range(3, NEURONS, 3))
    assert [one.error for one in offers] == sorted((one.error for one in offers), reverse=True)
    bias = net.down.bias  # type: ignore[union-attr]
    dense: list[Tensor] = []
    small: list[Tensor] = []
    for one in offers:
        narrowed = fill(analysis, narrow(net, one.factors.input_rank or 0))
        for some, model in ((dense, net), (small, narrowed)):
            model.down.register_forward_hook(lambda _module, _x, y, some=some: some.append((y - bias).detach()))  # type: ignore[union-attr]
            model(*X)
        lost = float((dense[-1] - small[-1]).square().sum() / dense[-1].square().sum())
        assert lost == pytest.approx(one.error, rel=1e-3, abs=1e-6)


def test_neurons_that_repeat_others_or_do_nothing_come_last_and_cost_nothing() -> None:
    net = make_net(Gated)
    gate, up = get_layer(net, "gate"), get_layer(net, "up")
    assert isinstance(gate.bias, Tensor)
    with torch.no_grad():
        for layer in (gate, up):
            layer.weight[3] = layer.weight[20]
        gate.bias[3] = gate.bias[20]
        up.weight[7] = 0
    analysis = take_apart(net)
    dense, small = net(*X).detach(), fill(analysis, narrow(net, NEURONS - 2))(*X).detach()
    torch.testing.assert_close(small, dense, rtol=1e-2, atol=1e-2)
    worse = fill(analysis, narrow(net, NEURONS // 2))(*X).detach()
    assert float((worse - dense).abs().max()) > 5 * float((small - dense).abs().max())


def test_leaving_out_by_cost_is_better_than_by_size() -> None:
    """Of neurons that are copies of each other, all but one are of no use, however large."""
    torch.manual_seed(0)
    basis = torch.randn(500, 6, dtype=torch.float64)
    inputs = torch.cat([basis, 3 * basis[:, :1].expand(-1, 4) + 0.01 * torch.randn(500, 4)], 1)
    weight = torch.randn(5, 10, dtype=torch.float64)
    order = order_neurons(weight, Metric(gram=inputs.T @ inputs))
    assert sorted(order.tolist()) == list(range(10))
    copies = {0, 6, 7, 8, 9}
    assert len(copies & set(order[:6].tolist())) == 1


@pytest.mark.parametrize("kind", [Gated, Plain])
def test_a_saved_state_fits_a_rebuilt_model(kind: type[nn.Module]) -> None:
    net = make_net(kind)
    plan = narrow(net, 9)
    small = fill(take_apart(net), plan)
    again = rebuild(net, plan)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(*X), small(*X))
    sides = sum(one.weight.numel() for one in (getattr(net, name) for name in plan))
    biases = sum(NEURONS - 9 for name in plan if name != "down" and getattr(net, name).bias is not None)
    assert count_parameters(net) - count_parameters(small) == sides * (NEURONS - 9) // NEURONS + biases
    assert all(isinstance(one, nn.Linear) for one in small.get_submodule("down").children())


def test_reconstruction_fits_the_columns_that_are_left_to_changed_inputs() -> None:
    net = make_net(Gated)
    analysis, plan = take_apart(net), {**narrow(net, 12), "head": Factors(rank=3)}
    plain, refitted = fill(analysis, plan), reconstruct(analysis, plan, X)
    wanted = net(*X)
    lost = [(one(*X) - wanted).detach().square().sum() for one in (plain, refitted)]
    assert bool(lost[1] < lost[0])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_is_left_can_be_rounded(precision: str) -> None:
    net = make_net(Gated)
    analysis, plan = take_apart(net), narrow(net, 12)
    small = fill(analysis, plan)
    rounded = round_layers(small, {f"{name}.0": precision for name in plan}, X)  # type: ignore[misc]
    wanted = small(*X).detach()
    assert 0 < float((rounded(*X).detach() - wanted).norm() / wanted.norm()) < 0.5
    taken, factors = analysis.layers["down"], plan["down"]
    error = measure_error(taken, Stored(factors=factors))
    assert error < measure_error(taken, Stored(factors=factors, weights=precision)) < error + 0.3  # type: ignore[arg-type]


def test_losses_on_unseen_samples_are_those_of_the_reader() -> None:
    net = make_net(Gated)
    taken = take_apart(net).layers["down"]
    few, many = (measure_held_out(taken, narrow(net, kept)["down"]) for kept in (6, 18))
    assert few is not None
    assert many is not None
    assert many < few < 1


def test_layers_that_are_not_marked_have_no_such_form() -> None:
    net = make_net(Gated)
    layers = find_layers(net)
    grams = collect_grams(net, X, layers)
    analysis = analyse(net, layers, {name: Metric(gram=gram) for name, gram in grams.items()}, "swift")
    assert analysis.model is net
    assert not any(list_candidates(one, 1, ("width",)) for one in analysis.layers.values())
