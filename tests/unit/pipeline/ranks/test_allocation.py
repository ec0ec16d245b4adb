"""Allocation over real layers: every form on offer, every sensitivity, and budgets met within one candidate."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.forms import count_parameters, keep_efficient
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import Factors, Form, RankPlan, Stored
from rankship_pipeline.models.layers import Layer, find_layers
from rankship_pipeline.models.layers import count_parameters as count_all
from rankship_pipeline.ranks.budget import keep_to_method
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.ranks.stats import Curve, LayerStats, Offer, gather_stats
from rankship_pipeline.recipe.choices import RankChoice, Sensitivity

METHODS = ("uniform", "strs", "knapsack")
FORMS: tuple[tuple[Form, ...], ...] = (("svd",), ("svd", "spatial"), ("svd", "tucker"), ("svd", "spatial", "tucker"))


class Net(nn.Module):
    """Kernels of several shapes, an embedding and a layer too small to factor."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 6)
        self.square = nn.Conv2d(6, 10, 3)
        self.flat = nn.Conv2d(8, 12, (1, 5))
        self.point = nn.Conv2d(9, 14, 1)
        self.linear = nn.Linear(12, 20)
        self.tiny = nn.Linear(2, 2)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    net = Net().eval()
    metrics = {}
    for layer in find_layers(net):
        X, Z = (
            torch.randn(60, n, dtype=torch.float64) * torch.linspace(0.1, 2, n) for n in (layer.columns, layer.rows)
        )
        gram = X.square().sum(0) if layer.kind == "embedding" else X.T @ X
        metrics[layer.name] = Metric(gram=gram / 60, curvature=Z.T @ Z / 60)
    return analyse(net, find_layers(net), metrics, "eigen")


@pytest.fixture(scope="module")
def menus(analysis: Analysis) -> dict[tuple[int, tuple[Form, ...]], tuple[LayerStats, ...]]:
    """Taken apart once for every step and set of forms; each layer with a measured curve of its own steepness."""
    found = {}
    for step in (1, 2, 3):
        for forms in FORMS:
            stats = gather_stats(analysis, RankChoice(step=step, forms=forms), {})
            found[step, forms] = tuple(
                replace(entry, curve=Curve(errors=(1e-3, 1.0), damages=(1e-4 * (1 + place), 0.1 * 3.0**place)))
                for place, entry in enumerate(stats)
            )
    return found


Menus = dict[tuple[int, tuple[Form, ...]], tuple[LayerStats, ...]]
choices = st.builds(
    RankChoice,
    method=st.sampled_from(METHODS),
    step=st.sampled_from([1, 2, 3]),
    forms=st.sampled_from(FORMS),
    sensitivity=st.sampled_from(get_args(Sensitivity)),
)


def find_raises(stats: tuple[LayerStats, ...], plan: RankPlan) -> list[int]:
    raises = []
    for entry, chosen in zip(stats, plan.layers, strict=True):
        if chosen.factors is not None:
            sizes = [one.cost for one in entry.candidates] + [entry.layer.parameters]
            raises.append(min(size for size in sizes if size > chosen.chosen_parameters) - chosen.chosen_parameters)
    return raises


@settings(max_examples=120)
@given(choice=choices, share=st.floats(0, 1), fixed=st.integers(0, 50))
def test_the_budget_is_met_within_one_candidate_whatever_is_on_offer(
    menus: Menus, choice: RankChoice, share: float, fixed: int
) -> None:
    stats = menus[choice.step, choice.forms]
    smallest = sum(price_parameters(0).find_least(entry.layer, choice.step, choice.forms) for entry in stats)
    dense = sum(entry.layer.parameters for entry in stats)
    budget = fixed + smallest + int(share * (dense - smallest))
    plan = allocate(stats, fixed, budget, choice)
    assert plan.total_parameters == fixed + sum(layer.chosen_parameters for layer in plan.layers) <= budget
    assert all(plan.gap < extra for extra in find_raises(stats, plan))
    for entry, layer in zip(stats, plan.layers, strict=True):
        assert layer.chosen_parameters == count_parameters(entry.layer, layer.factors)
        assert layer.stored in {entry.full, *(one.stored for one in entry.candidates)}
        assert layer.factors is None or layer.factors.form in choice.forms
    with pytest.raises(BudgetInfeasible):
        allocate(stats, fixed, fixed + smallest - 1, choice)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("method", [*METHODS, "arp"])
def test_the_filled_model_has_the_plans_parameters(analysis: Analysis, method: str, forms: tuple[Form, ...]) -> None:
    choice = RankChoice(method=method, step=2, forms=forms)  # type: ignore[arg-type]
    stats = gather_stats(analysis, keep_to_method(choice), {})
    dense = count_all(analysis.model)
    fixed = dense - sum(entry.layer.parameters for entry in stats)
    plan = allocate(stats, fixed, int(0.6 * dense), choice)
    assert plan.factors
    assert count_all(fill(analysis, plan.factors)) == plan.total_parameters <= 0.6 * dense


def test_more_forms_never_raise_the_knapsacks_predicted_error(menus: Menus) -> None:
    for step in (1, 2, 3):
        for share in (0.45, 0.6, 0.8):
            stats = menus[step, FORMS[0]]
            budget = int(share * sum(entry.layer.parameters for entry in stats))
            errors = [
                allocate(menus[step, f], 0, budget, RankChoice(step=step, forms=f)).predicted_error for f in FORMS
            ]
            assert errors[-1] <= min(errors) + 1e-9
            assert max(errors) <= errors[0] + 1e-9


# --- strs: one bound for every layer -------------------------------------------------------------------------------


@st.composite
def draw_menu(draw: st.DrawFn, name: str) -> LayerStats:
    """A layer whose offers have any errors, read through any rising curve."""
    layer = Layer(name=name, rows=draw(st.integers(2, 9)), columns=draw(st.integers(2, 9)))
    ranks = [k for k in range(1, 9) if layer.count_factored(k) < layer.parameters]
    errors = draw(st.lists(st.floats(0, 1), min_size=len(ranks), max_size=len(ranks)))
    offers = [
        Offer(Stored(factors=Factors(rank=k)), layer.count_factored(k), e) for k, e in zip(ranks, errors, strict=True)
    ]
    curve = Curve(errors=(0.01, 1.0), damages=(1e-3 * draw(st.integers(1, 5)), float(draw(st.integers(1, 5)))))
    return LayerStats(layer, np.ones(1), np.ones(1), keep_efficient(offers), curve, draw(st.floats(0.1, 5)))


drawn = st.integers(1, 4).flatmap(lambda count: st.tuples(*(draw_menu(f"l{index}") for index in range(count))))


@given(stats=drawn, share=st.floats(0, 1), sensitivity=st.sampled_from(get_args(Sensitivity)))
def test_strs_holds_every_layer_to_the_smallest_common_bound_that_fits(
    stats: tuple[LayerStats, ...], share: float, sensitivity: Sensitivity
) -> None:
    damages = [
        [(one.cost, entry.predict_damage(one.error, sensitivity)) for one in entry.candidates] for entry in stats
    ]

    def spend(bound: float) -> int:
        cheapest = [
            min([cost for cost, damage in row if damage <= bound], default=entry.layer.parameters)
            for entry, row in zip(stats, damages, strict=True)
        ]
        return sum(cheapest)

    dense = sum(entry.layer.parameters for entry in stats)
    least = sum(min([one.cost for one in entry.candidates], default=entry.layer.parameters) for entry in stats)
    budget = least + int(share * (dense - least))
    bounds = [damage for row in damages for _, damage in row]
    bound = min((one for one in bounds if spend(one) <= budget), default=0.0)
    choice = RankChoice(method="strs", step=1, sensitivity=sensitivity)
    plan = allocate(stats, 0, budget, choice)
    for entry, layer in zip(stats, plan.layers, strict=True):
        assert entry.predict_damage(layer.relative_error, sensitivity) <= bound
    assert spend(bound) <= plan.total_parameters <= budget


# --- what an error counts ------------------------------------------------------------------------------------------


def make_twins(nats: tuple[float | None, float | None]) -> tuple[LayerStats, ...]:
    layers = [Layer(name=name, rows=20, columns=20) for name in "ab"]
    errors = [0.8**k for k in range(1, 10)]
    candidates = tuple(Offer(Stored(factors=Factors(rank=k)), 40 * k, error) for k, error in enumerate(errors, 1))
    return tuple(
        LayerStats(layer, np.ones(20), np.ones(20), candidates, nats=one)
        for layer, one in zip(layers, nats, strict=True)
    )


@pytest.mark.parametrize("method", ["strs", "knapsack"])
def test_by_gradient_parameters_go_where_losing_all_would_cost_more(method: str) -> None:
    choice = RankChoice(method=method, step=1, sensitivity="gradient")  # type: ignore[arg-type]
    plan = allocate(make_twins((4.0, 0.5)), 0, 400, choice)
    assert plan.layers[0].chosen_parameters > plan.layers[1].chosen_parameters
    turned = allocate(make_twins((0.5, 4.0)), 0, 400, choice)
    assert turned.layers[0].chosen_parameters < turned.layers[1].chosen_parameters
    even = allocate(make_twins((4.0, 0.5)), 0, 400, replace(choice, sensitivity="relative"))
    assert [layer.chosen_parameters for layer in even.layers] == [200, 200]


def test_the_nats_of_a_layer_are_half_its_weighted_energy(analysis: Analysis) -> None:
    for entry, taken in zip(gather_stats(analysis, RankChoice(step=1), {}), analysis.layers.values(), strict=True):
        assert taken.metric.gram is not None
        assert taken.metric.curvature is not None
        G = taken.metric.gram.diag() if taken.metric.gram.ndim == 1 else taken.metric.gram
        plain = float(torch.trace(taken.metric.curvature @ taken.weight @ G @ taken.weight.T)) / 2
        assert entry.nats == pytest.approx(plain, rel=0.15)  # but for the curvature's damping
        assert entry.predict_damage(0.25, "gradient") == pytest.approx(0.25 * (entry.nats or 0))
        assert entry.predict_damage(0.25, "relative") == 0.25


def test_without_curvature_there_are_no_nats_and_an_error_is_its_share(analysis: Analysis) -> None:
    flat = analyse(analysis.model, find_layers(analysis.model), {}, "plain")
    for entry in gather_stats(flat, RankChoice(step=1), {}):
        assert entry.nats is None
        assert entry.predict_damage(0.25, "gradient") == 0.25
