"""Prices: operations as torch itself counts them, tables measured on a device, and budgets in either."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankship_pipeline.factors.analysis import analyse, fill
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import BudgetInfeasible, InputError
from rankship_pipeline.foundation.records import CostTable, Factors, LayerCost, Stored
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, count_parameters, find_layers
from rankship_pipeline.ranks.budget import resolve_budget
from rankship_pipeline.ranks.plan import allocate, make_plan
from rankship_pipeline.ranks.price import Price, price_flops, price_parameters, price_table, read_table
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice

CHOICE = RankChoice(step=1)


class Net(nn.Module):
    """Strided, dilated, lopsided and grouped convolutions, one layer called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.flat = nn.Conv2d(8, 12, (1, 5), (1, 2), (0, 2))
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(torch.relu(self.deep(torch.relu(self.stem(x)))))
        logits: Tensor = self.head(self.grouped(self.flat(y)).mean((2, 3)))
        return logits


class Reader(nn.Module):
    """A table of tokens and a mixture of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.mix = nn.Linear(12, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.mix(self.table(ids)))


class Sounds(nn.Module):
    """Convolutions over one axis, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 12, 5, 2, 2)
        self.deep = nn.Conv1d(12, 12, 3, padding="same")
        self.up = nn.ConvTranspose1d(12, 6, 4, 2, 1)
        self.head = nn.ConvTranspose2d(3, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.relu(self.deep(torch.relu(self.down(x)))))
        image: Tensor = self.head(y.unflatten(1, (3, 2)))
        return image


SUBJECTS: dict[str, tuple[nn.Module, Inputs]] = {
    "net": (Net().eval(), (torch.randn(4, 3, 18, 14),)),
    "sounds": (Sounds().eval(), (torch.randn(4, 2, 24),)),
    "reader": (Reader().eval(), (torch.randint(40, (4, 7)),)),
}


def count(model: nn.Module, inputs: Inputs) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(*(tensor[:1] for tensor in inputs))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_plan_costs_what_the_compressed_model_really_computes(name: str, share: float) -> None:
    model, inputs = SUBJECTS[name]
    layers = find_layers(model)
    price = price_flops(model, layers, inputs)
    analysis = analyse(model, layers, {}, "plain")
    dense = count(model, inputs)
    assert price.fixed + sum(price.price_layer(layer, Stored()) or 0 for layer in layers) == dense
    for forms in (("svd",), ("spatial", "svd"), ("tucker", "svd")):
        choice = replace(CHOICE, forms=forms)
        fixed = count_parameters(model) - sum(layer.parameters for layer in layers)
        plan = make_plan(analysis, choice, fixed, int(share * dense), inputs, {}, price)
        compressed = fill(analysis, plan.factors)
        assert plan.unit == "flops"
        assert plan.total_cost == count(compressed, inputs) <= plan.budget_cost
        assert plan.total_parameters == count_parameters(compressed)


def test_nothing_is_offered_that_costs_more_than_dense() -> None:
    model, inputs = SUBJECTS["net"]
    price = price_flops(model, find_layers(model), inputs)
    analysis = analyse(model, find_layers(model), {}, "plain")
    for entry in gather_stats(analysis, CHOICE, {}, price):
        assert all(one.cost < entry.full_cost for one in entry.candidates)
        assert [one.cost for one in entry.candidates] == sorted({one.cost for one in entry.candidates})


def make_table(unit: str = "ns", **changed: int) -> CostTable:
    """Two linear layers; `first` is never faster factored, and 4 is a step of `second`: rank 3 takes as long."""
    return CostTable(
        unit=unit,  # type: ignore[arg-type]  # tests give wrong ones too
        device="pi4",
        format="onnx",
        runtime="onnxruntime 1.31.1",
        threads=1,
        agent_sha256="a",
        measured_utc="2026-11-25T00:00:00Z",
        rounds=9,
        model_sha256="m",
        dense=1150,
        fixed=changed.get("fixed", 100),
        layers={
            "0": (LayerCost(factors=None, cost=50), LayerCost(factors=Factors(rank=2), cost=60)),
            "2": (
                LayerCost(factors=None, cost=1000),
                LayerCost(factors=Factors(rank=4), cost=300),
                LayerCost(factors=Factors(rank=8), cost=550),
            ),
        },
    )


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 40)).eval()


def plan_by(price: Price, budget: int, method: str = "knapsack") -> dict[str, Factors]:
    model = make_net()
    analysis = analyse(model, find_layers(model), {}, "plain")
    stats = gather_stats(analysis, CHOICE, {}, price)
    choice = replace(CHOICE, method=method)  # type: ignore[arg-type]  # as above
    plan = allocate(stats, 0, budget, choice, price)
    assert plan.total_cost <= budget
    return plan.factors


@pytest.mark.parametrize("method", ["knapsack", "uniform", "strs"])
@pytest.mark.parametrize(
    ("budget", "factors"),
    [(1150, {}), (1149, {"2": Factors(rank=8)}), (699, {"2": Factors(rank=4)}), (450, {"2": Factors(rank=4)})],
)
def test_a_table_offers_its_own_ranks_and_never_a_slower_one(
    method: str, budget: int, factors: dict[str, Factors]
) -> None:
    price = price_table(make_table(), find_layers(make_net()), "m", "table")
    assert plan_by(price, budget, method) == factors


def test_a_budget_below_the_fastest_model_is_refused_with_that_model() -> None:
    price = price_table(make_table(), find_layers(make_net()), "m", "table")
    with pytest.raises(BudgetInfeasible, match="449 ns, the smallest model at rank step 1 has 450"):
        plan_by(price, 449)


def test_ranks_off_the_step_do_not_count_as_the_fastest() -> None:
    price = price_table(make_table(), find_layers(make_net()), "m", "table")
    assert [price.find_least(layer, 8, ("svd",)) for layer in find_layers(make_net())] == [50, 550]
    assert [price.find_least(layer, 1, ("spatial",)) for layer in find_layers(make_net())] == [50, 1000]


def test_the_fastest_model_loses_neurons_of_all_their_layers_or_of_none() -> None:
    """A reader with few neurons alone would cost 1 of 100."""
    feeder, reader = Layer(name="up", rows=16, columns=8, feeds="down"), Layer(name="down", rows=8, columns=16)
    layers = (feeder, replace(reader, fed_by=("up",)))
    ways = {
        "down": {8: 1, 4: 1},
        "up": {8: 40, 4: 45},  # measured times need not fall with the number of neurons
    }
    narrow = {
        name: tuple(
            LayerCost(
                factors=Factors(
                    form="width", rank=8 if name == "down" else k, input_rank=k if name == "down" else None
                ),
                cost=cost,
            )
            for k, cost in some.items()
        )
        for name, some in ways.items()
    }
    low = {"down": (LayerCost(factors=Factors(rank=4), cost=30),), "up": (LayerCost(factors=Factors(rank=4), cost=60),)}
    for own, least in ({name: narrow[name] for name in ways}, 41), (low, 90), ({"down": narrow["down"], "up": ()}, 200):
        rows = {name: (LayerCost(factors=None, cost=100), *some) for name, some in own.items()}
        price = price_table(replace(make_table(fixed=7), layers=rows), layers, "m", "table")
        assert price.find_smallest(layers, 4, ("svd", "width")) == 7 + least
        assert price.find_smallest(layers, 3, ("svd", "width")) == 7 + 200, "no rank or width of the table is on offer"
    parameters = price_parameters(7)
    assert parameters.find_smallest(layers, 2, ("width",)) == 7 + 2 * (8 + 8)
    assert parameters.find_smallest(layers[:1], 2, ("width",)) == 7 + 8 * 16


def test_a_table_of_another_model_is_refused_by_layer() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 40))
    with pytest.raises(InputError, match="has no dense cost of 1"):
        price_table(make_table(), find_layers(model), "m", "table")


def test_a_table_of_other_shapes_is_refused() -> None:
    with pytest.raises(InputError, match=r"other shapes \(m…, not another…\)"):
        price_table(make_table(), find_layers(make_net()), "another", "table")


def test_what_the_recipe_keeps_dense_is_part_of_what_is_fixed() -> None:
    price = price_table(make_table(), find_layers(make_net(), ("0",)), "m", "table")
    assert price.fixed == 100 + 50
    assert price.price_layer(find_layers(make_net())[1], Stored(factors=Factors(rank=4))) == 300


def test_a_table_is_read_back_and_its_unit_held(tmp_path: Path) -> None:
    path = tmp_path / "cost-table.json"
    path.write_text(encode(make_table()))
    assert read_table(path, "ns") == make_table()
    with pytest.raises(InputError, match="holds ns, the budget is in uj"):
        read_table(path, "uj")
    with pytest.raises(InputError, match="cannot read"):
        read_table(tmp_path / "none.json", "ns")
    path.write_text(path.read_text()[:-1])
    with pytest.raises(InputError, match="cost-table"):
        read_table(path, "ns")


@pytest.mark.parametrize(
    ("budget", "amount", "unit"),
    [
        (Budget(kept_flops=0.4), 400, "flops"),
        (Budget(flops=77), 77, "flops"),
        (Budget(latency_us=12, costs="t.json"), 12_000, "ns"),
        (Budget(latency_ms=12, on="pi4"), 12_000_000, "ns"),
        (Budget(latency_ms=0.3, costs="t.json", on="pi4"), 300_000, "ns"),
        (Budget(time_to_first_token_ms=40, on="pi4"), 40_000_000, "ns"),
        (Budget(token_ms=0.25, on="pi4"), 250_000, "ns"),
        (Budget(energy_uj=9, costs="t.json"), 9, "uj"),
        (Budget(kept_parameters=0.4), 400, "parameters"),
        (Budget(size_bytes=403), 100, "parameters"),
    ],
)
def test_a_budget_resolves_in_its_own_unit(budget: Budget, amount: int, unit: str) -> None:
    assert (resolve_budget(budget, 1001), budget.unit) == (amount, unit)


def test_parameters_are_the_price_that_forms_name() -> None:
    model = make_net()
    stats = gather_stats(analyse(model, find_layers(model), {}, "plain"), CHOICE, {})
    assert [entry.full_cost for entry in stats] == [144, 480]
    assert price_parameters(52).find_least(stats[1].layer, 1, ("svd",)) == 52
