import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.calibrate import collect_grams
from rankship_pipeline.compress import analyse, compress
from rankship_pipeline.errors import BuildError
from rankship_pipeline.factorise import decompose_plain
from rankship_pipeline.layers import as_matrix, count_parameters, find_layers, get_layer
from rankship_pipeline.rebuild import fill_factors, rebuild
from rankship_pipeline.recipe import RankChoice
from rankship_pipeline.records import LayerRank, RankPlan


class Net(nn.Module):
    """Nested layers, norms, an embedding: most of it outside the factorable layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, bias=False), nn.ReLU()
        )
        self.table = nn.Embedding(3, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 2, h, w) to (batch, 10)."""
        y: Tensor = self.head(self.body(x).mean((2, 3)) + self.table.weight.sum(0))
        return y


def make_plan(model: nn.Module, ranks: dict[str, int]) -> RankPlan:
    layers = find_layers(model)
    chosen = {
        layer.name: layer.parameters if (rank := ranks.get(layer.name)) is None else layer.count_factored(rank)
        for layer in layers
    }
    fixed = count_parameters(model) - sum(layer.parameters for layer in layers)
    return RankPlan(
        method="test",
        layers=tuple(
            LayerRank(
                name=layer.name,
                rows=layer.rows,
                columns=layer.columns,
                rank=ranks.get(layer.name),
                dense_parameters=layer.parameters,
                chosen_parameters=chosen[layer.name],
                relative_error=0.0,
                interference=None,
            )
            for layer in layers
        ),
        fixed_parameters=fixed,
        total_parameters=fixed + sum(chosen.values()),
        budget_parameters=fixed + sum(chosen.values()),
        predicted_error=0.0,
    )


def factor(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    rebuilt = rebuild(model, ranks)
    spectra = {
        layer.name: decompose_plain(as_matrix(get_layer(model, layer.name).weight), None)
        for layer in find_layers(model)
    }
    fill_factors(rebuilt, ranks, spectra)
    return rebuilt


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 1, "stride": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_factored_convolution_at_full_rank_computes_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, **options)).eval()
    layer = find_layers(model)[0]
    rebuilt = factor(model, {"0": min(layer.rows, layer.columns)})
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(rebuilt(x), model(x), rtol=1e-4, atol=1e-5)
    first, second = rebuilt.get_submodule("0").children()
    assert (first.bias is None, second.bias is None) == (True, options.get("bias") is False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7)])
def test_a_factored_linear_layer_at_full_rank_computes_the_same(shape: tuple[int, ...], *, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias)).eval()
    x = torch.randn(shape)
    torch.testing.assert_close(factor(model, {"0": 5})(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_low_rank_computes_what_the_truncated_weight_computes() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).eval()
    U, sigma, Vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    low = (U[:, :2] * sigma[:2]) @ Vh[:2]
    x = torch.randn(4, 7)
    expected = x @ low.float().T + linear.bias
    torch.testing.assert_close(factor(nn.Sequential(linear), {"0": 2})(x), expected, rtol=1e-4, atol=1e-5)


def test_a_whole_model_keeps_its_function_where_every_rank_is_full() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    rebuilt = factor(model, {"body.0": 6, "body.3": 8, "head": 8})
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(rebuilt(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [{}, {"body.0": 2}, {"body.3": 3, "head": 1}, {"body.0": 1, "body.3": 1, "head": 1}])
def test_the_rebuilt_model_has_the_plans_parameters_in_all(ranks: dict[str, int]) -> None:
    model = Net()
    plan = make_plan(model, ranks)
    assert count_parameters(rebuild(model, plan.ranks)) == plan.total_parameters
    assert plan.ranks == ranks


@pytest.mark.parametrize("method", ["uniform", "arp", "knapsack"])
@pytest.mark.parametrize("whitening", ["plain", "eigen"])
def test_a_compressed_model_has_the_parameters_that_its_plan_says(method: str, whitening: str) -> None:
    torch.manual_seed(0)
    model, layers = Net().eval(), find_layers(Net())
    dense = count_parameters(model)
    fixed = dense - sum(layer.parameters for layer in layers)
    grams = collect_grams(model, (torch.randn(20, 2, 6, 6),), layers)
    analysis = analyse(model, layers, grams, whitening, {"head": 0.25})
    choice = RankChoice(method=method, step=1)  # type: ignore[arg-type]
    compressed, plan = compress(analysis, choice, fixed, int(0.7 * dense))
    assert count_parameters(compressed) == plan.total_parameters <= 0.7 * dense
    assert plan.ranks
    assert [layer.interference for layer in plan.layers] == [None, None, 0.25]
    assert compressed(torch.randn(2, 2, 6, 6)).isfinite().all()


def test_the_original_is_not_touched() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    factor(model, {"head": 2})
    assert isinstance(model.head, nn.Linear)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_saved_state_fits_the_structure_rebuilt_from_its_plan() -> None:
    torch.manual_seed(0)
    model, ranks = Net(), {"body.3": 3, "head": 2}
    factored = factor(model, ranks)
    again = rebuild(Net(), ranks)
    again.load_state_dict(factored.state_dict())
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(again(x), factored(x))
    assert not again.training


def test_factors_of_another_rank_do_not_fit() -> None:
    model = Net()
    rebuilt = rebuild(model, {"head": 2})
    spectra = {"head": decompose_plain(as_matrix(model.head.weight), None)}
    with pytest.raises(BuildError, match=r"a factor of shape \(3, 8\) does not fit"):
        fill_factors(rebuilt, {"head": 3}, spectra)
