import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import analyse, fill
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.forms import count_parameters as count_stored
from rankship_pipeline.factors.forms import list_operators, make_weights
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.records import Factors, LayerRank, RankPlan
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.ranks.budget import keep_to_method
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.choices import RankChoice


class Net(nn.Module):
    """Nested layers, norms, an embedding that is looked up in and one that is read whole, which has to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, bias=False), nn.ReLU()
        )
        self.table = nn.Embedding(3, 8)
        self.words = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 2, h, w) to (batch, 10)."""
        words = self.words((x[:, 0, 0].abs() * 10).long() % 20).mean(1)
        y: Tensor = self.head(self.body(x).mean((2, 3)) + self.table.weight.sum(0) + words)
        return y


STAYS = ("table",)


def svd(**ranks: int) -> dict[str, Factors]:
    return {name: Factors(rank=rank) for name, rank in ranks.items()}


def make_plan(model: nn.Module, factors: dict[str, Factors]) -> RankPlan:
    layers = find_layers(model, STAYS)
    chosen = {layer.name: count_stored(layer, factors.get(layer.name)) for layer in layers}
    fixed = count_parameters(model) - sum(layer.parameters for layer in layers)
    return RankPlan(
        method="test",
        layers=tuple(
            LayerRank(
                name=layer.name,
                rows=layer.rows,
                columns=layer.columns,
                factors=factors.get(layer.name),
                operators=tuple(one.shape for one in list_operators(layer, factors.get(layer.name))),
                dense_parameters=layer.parameters,
                chosen_parameters=chosen[layer.name],
                relative_error=0.0,
                interference=None,
            )
            for layer in layers
        ),
        fixed_parameters=fixed,
        total_parameters=fixed + sum(chosen.values()),
        unit="parameters",
        total_cost=fixed + sum(chosen.values()),
        budget_cost=fixed + sum(chosen.values()),
        predicted_error=0.0,
    )


def factor(model: nn.Module, factors: dict[str, Factors]) -> nn.Module:
    return fill(analyse(model, find_layers(model, STAYS), {}, "plain"), factors)


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
    rebuilt = factor(model, {"0": Factors(rank=min(layer.rows, layer.columns))})
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
    torch.testing.assert_close(factor(model, {"0": Factors(rank=5)})(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_low_rank_computes_what_the_truncated_weight_computes() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).eval()
    U, sigma, Vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    low = (U[:, :2] * sigma[:2]) @ Vh[:2]
    x = torch.randn(4, 7)
    expected = x @ low.float().T + linear.bias
    torch.testing.assert_close(factor(nn.Sequential(linear), {"0": Factors(rank=2)})(x), expected, rtol=1e-4, atol=1e-5)


FULL = {
    "svd": {"body.0": Factors(rank=6), "body.3": Factors(rank=8), "words": Factors(rank=8), "head": Factors(rank=8)},
    "spatial": {"body.0": Factors(form="spatial", rank=6), "body.3": Factors(form="spatial", rank=18)},
    "tucker": {"body.0": Factors(form="tucker", rank=6, input_rank=2)},
}


@pytest.mark.parametrize("form", FULL)
def test_a_whole_model_keeps_its_function_where_every_rank_is_full(form: str) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(factor(model, FULL[form])(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"body.0": Factors(rank=2)},
        {"body.3": Factors(rank=3), "head": Factors(rank=1)},
        {"body.0": Factors(form="spatial", rank=5), "words": Factors(rank=2)},
        {"body.3": Factors(form="tucker", rank=3, input_rank=2), "head": Factors(rank=1)},
        {name: Factors(rank=1) for name in ("body.0", "body.3", "words", "head")},
    ],
)
def test_the_rebuilt_model_has_the_plans_parameters_in_all(factors: dict[str, Factors]) -> None:
    model = Net()
    plan = make_plan(model, factors)
    assert count_parameters(rebuild(model, plan.factors)) == plan.total_parameters
    assert plan.factors == factors


@pytest.mark.parametrize("method", ["uniform", "arp", "strs", "knapsack"])
@pytest.mark.parametrize("whitening", ["plain", "eigen"])
@pytest.mark.parametrize("forms", [("svd",), ("svd", "spatial", "tucker")])
def test_a_compressed_model_has_the_parameters_that_its_plan_says(
    method: str, whitening: str, forms: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model, layers = Net().eval(), find_layers(Net(), STAYS)
    dense = count_parameters(model)
    fixed = dense - sum(layer.parameters for layer in layers)
    grams = collect_grams(model, (torch.randn(20, 2, 6, 6),), layers)
    metrics = {} if whitening == "plain" else {name: Metric(gram=gram) for name, gram in grams.items()}
    analysis = analyse(model, layers, metrics, whitening)
    choice = RankChoice(method=method, step=1, forms=forms)  # type: ignore[arg-type]
    stats = gather_stats(analysis, keep_to_method(choice), {"head": 0.25})
    plan = allocate(stats, fixed, int(0.7 * dense), choice)
    compressed = fill(analysis, plan.factors)
    assert count_parameters(compressed) == plan.total_parameters <= 0.7 * dense
    assert plan.factors
    assert [layer.interference for layer in plan.layers] == [None, None, None, 0.25]
    assert compressed(torch.randn(2, 2, 6, 6)).isfinite().all()


def test_the_original_is_not_touched() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    factor(model, svd(head=2, words=1))
    assert isinstance(model.head, nn.Linear)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_saved_state_fits_the_structure_rebuilt_from_its_plan() -> None:
    torch.manual_seed(0)
    model = Net()
    factors = {**svd(head=2, words=3), "body.3": Factors(form="tucker", rank=3, input_rank=4)}
    factored = factor(model, factors)
    again = rebuild(Net(), factors)
    again.load_state_dict(factored.state_dict())
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(again(x), factored(x))
    assert not again.training


def test_factors_of_another_rank_do_not_fit() -> None:
    model = Net()
    rebuilt = rebuild(model, svd(head=2))
    weights = make_weights(analyse(model, find_layers(model), {}, "plain").layers["head"], Factors(rank=3))
    with pytest.raises(BuildError, match=r"a factor of shape \(3, 8\) does not fit"):
        fill_factors(rebuilt.get_submodule("head"), weights)


class Casting(nn.Module):
    """Transformers' vision models cast pixels to the type of a layer's weight; others read the weight itself."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(6, 6), reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            return nn.functional.linear(x, self.layer.weight)
        y: Tensor = self.layer(x.to(self.layer.weight.dtype).to(self.layer.weight.device))
        return y


def test_a_factored_layer_tells_its_type_and_gives_no_weight() -> None:
    x = torch.randn(2, 6, dtype=torch.float64)
    assert rebuild(Casting(reads=False), {"layer": Factors(rank=2)})(x).dtype == torch.float32
    with pytest.raises(TypeError):
        rebuild(Casting(reads=True), {"layer": Factors(rank=2)})(x.float())
