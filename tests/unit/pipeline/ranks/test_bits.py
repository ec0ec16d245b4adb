"""Ranks and types of weights chosen together: never beyond the bytes, never worse than either alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from rankship_pipeline.factors.analysis import Analysis, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import CostTable, Factors, LayerCost, RankPlan, Stored
from rankship_pipeline.models.layers import Layer, count_parameters, describe, find_layers
from rankship_pipeline.quantise.chains import measure_error
from rankship_pipeline.quantise.sizes import SIMULATED, count_bytes, is_offered
from rankship_pipeline.ranks.allocators import allocate_knapsack, total_cost
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.price import price_bytes, price_parameters, price_table
from rankship_pipeline.ranks.stats import gather_stats
from rankship_pipeline.recipe.choices import RankChoice

CHOICE = RankChoice(step=4, sensitivity="relative")
BOTH: tuple[Precision, ...] = ("int8", "int4")


def make_analysis() -> Analysis:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    layers, metrics = find_layers(net), {}
    for layer in layers:
        X = torch.randn(300, layer.columns).double() @ torch.randn(layer.columns, layer.columns).double()
        metrics[layer.name] = Metric(gram=X.T @ X / 300)
    return analyse(net, layers, metrics, "eigen")


def plan_bytes(
    analysis: Analysis, weights: tuple[Precision, ...], budget: int, choice: RankChoice = CHOICE
) -> RankPlan:
    fixed = count_parameters(analysis.model) - sum(one.layer.parameters for one in analysis.layers.values())
    price = price_bytes(fixed, weights, SIMULATED)
    return allocate(gather_stats(analysis, choice, {}, price), fixed, budget, choice, price)


@pytest.mark.parametrize("share", [0.12, 0.16, 0.2, 0.24])
def test_both_together_lose_no_more_than_either_alone_at_the_same_bytes(share: float) -> None:
    analysis = make_analysis()
    budget = int(share * 4 * count_parameters(analysis.model))
    joint = plan_bytes(analysis, BOTH, budget)
    assert joint.unit == "bytes"
    assert joint.total_cost <= joint.budget_cost == budget
    sizes = [count_bytes(analysis.layers[layer.name].layer, layer.stored) for layer in joint.layers]
    assert joint.total_cost == 4 * joint.fixed_parameters + sum(sizes)
    for weights, choice in ((("int8",), CHOICE), (("int4",), CHOICE), (BOTH, replace(CHOICE, forms=()))):
        try:
            alone = plan_bytes(analysis, weights, budget, choice)
        except BudgetInfeasible:
            continue
        assert joint.predicted_error <= alone.predicted_error + 1e-9


def test_the_plan_is_the_best_of_all_by_measured_errors() -> None:
    analysis = make_analysis()
    budget = int(0.14 * 4 * count_parameters(analysis.model))
    price = price_bytes(0, BOTH, SIMULATED)
    stats = gather_stats(analysis, CHOICE, {}, price)
    chosen = allocate_knapsack(stats, budget, CHOICE)
    menus = []
    for entry in stats:
        taken = analysis.layers[entry.layer.name]
        ways = [entry.full, *(one.stored for one in entry.candidates)]
        menus.append([(entry.find_cost(one), measure_error(taken, one)) for one in ways])
    best = min(
        sum(error for _, error in some) for some in itertools.product(*menus) if sum(cost for cost, _ in some) <= budget
    )
    measured = sum(measure_error(analysis.layers[name], one) for name, one in chosen.items())
    assert total_cost(stats, chosen) <= budget
    assert measured <= 1.05 * best


def test_float32_on_the_menu_is_taken_where_the_budget_allows_it() -> None:
    analysis = make_analysis()
    plan = plan_bytes(analysis, ("float32", "int8"), 4 * count_parameters(analysis.model))
    assert {layer.stored for layer in plan.layers} == {Stored()}
    assert plan.predicted_error == 0
    tighter = plan_bytes(analysis, ("float32", "int8"), int(1.5 * count_parameters(analysis.model)))
    assert "int8" in {layer.weights for layer in tighter.layers}
    assert all(f", {one.weights}" in one.cells[2] for one in tighter.layers if one.weights != "float32")


def test_at_one_type_the_other_methods_take_it_too() -> None:
    analysis = make_analysis()
    for method in ("uniform", "strs"):
        choice = replace(CHOICE, method=method)
        plan = plan_bytes(analysis, ("int8",), int(0.7 * count_parameters(analysis.model)), choice)
        assert {layer.weights for layer in plan.layers} == {"int8"}
        assert plan.total_cost <= plan.budget_cost


def test_the_smallest_budget_is_named_in_bytes() -> None:
    with pytest.raises(BudgetInfeasible, match="bytes") as raised:
        plan_bytes(make_analysis(), BOTH, 100)
    assert "bytes" in raised.value.hint


def test_bytes_count_bits_scales_and_blocks() -> None:
    linear, image = Layer(name="x", rows=64, columns=96), describe("x", nn.Conv2d(8, 16, 3))
    table = describe("x", nn.Embedding(100, 32))
    assert count_bytes(linear, Stored()) == 4 * 64 * 96
    assert count_bytes(linear, Stored(weights="int8")) == 64 * 96 + 4 * 64
    assert count_bytes(linear, Stored(weights="int4")) == 64 * 96 // 2 + 4 * 64 * 3
    assert count_bytes(image, Stored(weights="int4")) == 16 * 72 // 2 + 4 * 16
    factors = Factors(rank=32)
    assert count_bytes(linear, Stored(factors=factors, weights="int8")) == 32 * (64 + 96) + 4 * (32 + 64)
    assert count_bytes(table, Stored(weights="int8")) == 3200 + 4 * 100
    assert count_bytes(table, Stored(factors=Factors(rank=8), weights="int8")) == 8 * 132 + 4 * (100 + 32)


def test_runtimes_have_no_int4_of_odd_widths_or_convolutions() -> None:
    linear, image = Layer(name="x", rows=64, columns=96), describe("x", nn.Conv2d(32, 32, 1))
    assert is_offered(linear, Stored(weights="int4"))
    assert is_offered(linear, Stored(factors=Factors(rank=32), weights="int4"))
    assert not is_offered(linear, Stored(factors=Factors(rank=24), weights="int4"))
    assert is_offered(image, Stored(weights="int8"))
    assert not is_offered(image, Stored(weights="int4"))
    assert is_offered(image, Stored(weights="int4"), SIMULATED)
    price = price_bytes(0, ("int4",))
    assert price.list_types(linear) == ["int4"]
    least = count_bytes(linear, Stored(factors=Factors(rank=32), weights="int4"))  # ranks 8, 16 and 24 are not offered
    assert price.find_least(linear, 8, ("svd",)) == least < count_bytes(linear, Stored(weights="int4"))
    assert price.list_types(image) == ["float32"]


def test_a_tables_types_are_on_offer_and_an_old_table_has_float32_alone() -> None:
    layer = Layer(name="a", rows=8, columns=8)
    costs = (
        LayerCost(factors=None, cost=100),
        LayerCost(factors=None, cost=60, weights="int8"),
        LayerCost(factors=Factors(rank=4), cost=50, weights="int8"),
    )
    old = CostTable(
        unit="ns",
        device="here",
        format="onnx",
        runtime="r",
        threads=1,
        agent_sha256="",
        measured_utc="",
        rounds=1,
        model_sha256="m",
        dense=150,
        fixed=50,
        layers={"a": costs[:1]},
    )
    new = replace(old, layers={"a": costs})
    assert price_table(old, (layer,), "m", "t", ("int8",)).list_types(layer) == ["float32"]
    price = price_table(new, (layer,), "m", "t", ("float32", "int8"))
    assert price.list_types(layer) == ["float32", "int8"]
    assert price.find_least(layer, 4, ("svd",)) == 50
    assert price_table(new, (layer,), "m", "t").find_least(layer, 4, ("svd",)) == 100
    assert price_parameters(0).list_types(layer) == ["float32"]
