import itertools
import re
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankship_pipeline.factors.forms import keep_efficient
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import Factors, RankPlan, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.allocators import ALLOCATORS
from rankship_pipeline.ranks.budget import check_feasible, resolve_budget
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.ranks.stats import LayerStats, Offer
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RANK_METHODS, RankMethod

Method = Literal["uniform", "arp", "strs", "knapsack"]
METHODS: tuple[Method, ...] = ("uniform", "arp", "strs", "knapsack")
SPENDING: tuple[Method, ...] = ("uniform", "strs", "knapsack")  # ARP's threshold leaves what it leaves
SOLVER = 1e-9  # the absolute gap, relative to the largest error of one option

energies = st.just(0.0) | st.floats(1e-6, 1e3)


@st.composite
def draw_stats(draw: st.DrawFn, name: str) -> LayerStats:
    """A layer whose whitened spectrum may be shorter than the plain one, and hold zeros and repeated values."""
    rows, columns = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    full = min(rows, columns)
    seen = draw(st.integers(1, full))
    plain = draw(st.lists(energies, min_size=full, max_size=full))
    energy = draw(st.lists(energies, min_size=seen, max_size=seen))
    return make_stats(name, rows, columns, plain, energy)


def make_stats(name: str, rows: int, columns: int, plain: list[float], energy: list[float] | None = None) -> LayerStats:
    return LayerStats(
        layer=Layer(name=name, rows=rows, columns=columns),
        plain=np.array(sorted(plain, reverse=True)),
        energy=np.array(sorted(plain if energy is None else energy, reverse=True)),
        candidates=(),
    )


def store(rank: int) -> Stored:
    return Stored(factors=Factors(rank=rank))


def offer(stats: tuple[LayerStats, ...], step: int) -> tuple[LayerStats, ...]:
    """The layers with all their efficient ranks on offer."""
    offered = []
    for entry in stats:
        ranks = [store(k) for k in entry.list_ranks(step)]
        candidates = [Offer(one, entry.find_cost(one), entry.predict_error(one)) for one in ranks]
        offered.append(replace(entry, candidates=keep_efficient(candidates)))
    return tuple(offered)


def list_ranks(plan: RankPlan) -> list[int | None]:
    return [None if layer.factors is None else layer.factors.rank for layer in plan.layers]


nets = st.integers(1, 4).flatmap(lambda count: st.tuples(*(draw_stats(f"l{index}") for index in range(count))))
steps = st.integers(1, 4)
shares = st.floats(0, 1)
FIXED = 37


def find_smallest(stats: tuple[LayerStats, ...], step: int) -> int:
    return FIXED + sum(min(s.layer.parameters, s.layer.count_factored(step)) for s in stats)


def find_budget(stats: tuple[LayerStats, ...], step: int, share: float) -> int:
    """A feasible budget, from the smallest model (0) to the dense one (1)."""
    low, high = find_smallest(stats, step), FIXED + sum(s.layer.parameters for s in stats)
    return low + int(share * (high - low))


def plan_for(method: Method, stats: tuple[LayerStats, ...], budget: int, step: int) -> RankPlan:
    return allocate(offer(stats, step), FIXED, budget, RankChoice(method=method, step=step))


def plan_arp(stats: tuple[LayerStats, ...], threshold: float) -> RankPlan:
    return allocate(stats, FIXED, 0, RankChoice(method="arp", threshold=threshold))


def list_raises(stats: tuple[LayerStats, ...], plan: RankPlan, step: int) -> list[int]:
    """What every possible next step of one layer would cost."""
    raises = []
    for entry, chosen in zip(offer(stats, step), plan.layers, strict=True):
        if chosen.factors is not None:
            larger = [one.cost for one in entry.candidates if one.cost > chosen.chosen_parameters]
            raises.append((larger[0] if larger else entry.layer.parameters) - chosen.chosen_parameters)
    return raises


# --- the budget is met ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(stats=nets, step=steps, share=shares)
def test_no_plan_is_above_its_budget_and_every_sum_is_right(
    method: Method, stats: tuple[LayerStats, ...], step: int, share: float
) -> None:
    budget = find_budget(stats, step, share)
    plan = plan_for(method, stats, budget, step)
    costs = [
        layer.rows * layer.columns if rank is None else rank * (layer.rows + layer.columns)
        for layer, rank in zip(plan.layers, list_ranks(plan), strict=True)
    ]
    assert [layer.chosen_parameters for layer in plan.layers] == costs
    assert plan.total_parameters == FIXED + sum(costs) <= budget == plan.budget_cost
    assert plan.gap == budget - plan.total_parameters >= 0
    assert plan.predicted_error == sum(layer.relative_error for layer in plan.layers)
    assert [layer.name for layer in plan.layers] == [entry.layer.name for entry in stats]


@pytest.mark.parametrize("method", SPENDING)
@given(stats=nets, step=steps, share=shares)
def test_what_is_left_unspent_is_less_than_any_further_step(
    method: Method, stats: tuple[LayerStats, ...], step: int, share: float
) -> None:
    plan = plan_for(method, stats, find_budget(stats, step, share), step)
    assert all(plan.gap < extra for extra in list_raises(stats, plan, step))


@given(stats=nets, share=shares)
def test_any_larger_threshold_would_take_arp_above_the_budget(stats: tuple[LayerStats, ...], share: float) -> None:
    plan = plan_for("arp", stats, find_budget(stats, 1, share), 1)
    reached = [
        float(entry.plain[:rank].sum() / entry.plain.sum()) if entry.plain.any() else 1.0
        for entry, rank in zip(stats, list_ranks(plan), strict=True)
        if rank is not None
    ]
    threshold = min(reached, default=1.0) + 1e-9  # at which the next layer takes its next rank
    assume(threshold <= 1)
    assert plan_arp(stats, threshold).total_parameters > plan.budget_cost


@pytest.mark.parametrize("method", METHODS)
@given(stats=nets, step=steps)
def test_a_budget_for_the_dense_model_keeps_everything_dense_or_lossless(
    method: Method, stats: tuple[LayerStats, ...], step: int
) -> None:
    plan = plan_for(method, stats, find_budget(stats, step, 1), step)
    if method == "arp":  # it goes by the plain spectrum
        for entry, rank in zip(stats, list_ranks(plan), strict=True):
            tail = 0.0 if rank is None else float(entry.plain[rank:].sum())
            assert tail <= 1e-9 * float(entry.plain.sum())
    else:
        assert plan.factors == {}
        assert plan.gap == 0
        assert plan.predicted_error == 0


@pytest.mark.parametrize("method", METHODS)
@given(stats=nets, step=steps, share=shares)
def test_no_layer_is_factored_at_or_above_its_dense_cost(
    method: Method, stats: tuple[LayerStats, ...], step: int, share: float
) -> None:
    plan = plan_for(method, stats, find_budget(stats, step, share), step)
    for layer, rank in zip(plan.layers, list_ranks(plan), strict=True):
        if rank is not None:
            assert layer.chosen_parameters < layer.dense_parameters
            assert 1 <= rank < min(layer.rows, layer.columns)
            assert method == "arp" or rank % step == 0


@given(stats=nets, step=steps)
def test_no_option_at_or_above_dense_cost_is_offered_and_none_below_is_missing(
    stats: tuple[LayerStats, ...], step: int
) -> None:
    for entry in stats:
        layer = entry.layer
        assert entry.list_ranks(step) == [
            k for k in range(1, layer.parameters + 1) if k % step == 0 and layer.count_factored(k) < layer.parameters
        ]


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_cannot_be_factored_stays_dense(method: Method) -> None:
    small, large = make_stats("small", 2, 2, [1, 1]), make_stats("large", 20, 20, [1.0] * 20)
    assert small.list_ranks(1) == []
    plan = plan_for(method, (small, large), FIXED + 4 + 80, 1)
    assert list_ranks(plan) == [None, 2]
    assert plan.gap == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_step_too_large_for_a_layer_leaves_it_dense(method: Method) -> None:
    stats = (make_stats("a", 8, 8, [8, 4, 2, 1, 1, 1, 1, 1]), make_stats("b", 64, 64, [1.0] * 64))
    plan = plan_for(method, stats, FIXED + 64 + 8 * 128, 8)
    if method != "arp":
        assert list_ranks(plan) == [None, 8]


# --- infeasible budgets and their units ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(stats=nets, step=steps)
def test_an_infeasible_budget_names_the_smallest_that_works(
    method: Method, stats: tuple[LayerStats, ...], step: int
) -> None:
    smallest = find_smallest(stats, 1 if method == "arp" else step)  # ARP's ranks keep to no step
    with pytest.raises(BudgetInfeasible) as caught:
        plan_for(method, stats, smallest - 1, step)
    named = re.search(r"rank step \d+ has ([\d,]+)", str(caught.value))
    assert named is not None
    assert int(named[1].replace(",", "")) == smallest
    plan_for(method, stats, smallest, step)
    total = FIXED + sum(entry.layer.parameters for entry in stats)
    share = re.search(r"kept_parameters = ([\d.]+)", caught.value.hint)
    assert share is not None
    assert resolve_budget(Budget(kept_parameters=float(share[1])), total) >= smallest


@given(st.integers(1, 10**9), st.integers(1, 1000))
def test_a_share_with_three_digits_means_exactly_that_share(parameters: int, mills: int) -> None:
    budget = resolve_budget(Budget(kept_parameters=mills / 1000), parameters)
    assert budget == parameters * mills // 1000


def test_every_unit_of_the_budget_is_resolved() -> None:
    assert resolve_budget(Budget(kept_parameters=0.4), 1001) == 400
    assert resolve_budget(Budget(kept_parameters=1.0), 1001) == 1001
    assert resolve_budget(Budget(parameters=77), 1001) == 77
    assert resolve_budget(Budget(size_bytes=403), 1001) == 100


def test_a_model_without_layers_is_feasible_as_it_is() -> None:
    check_feasible([], price_parameters(10), 10, RankChoice())
    with pytest.raises(BudgetInfeasible):
        check_feasible([], price_parameters(10), 9, RankChoice())


# --- errors --------------------------------------------------------------------------------------------------------


@given(stats=nets)
def test_predicted_errors_fall_from_one_to_zero(stats: tuple[LayerStats, ...]) -> None:
    for entry in stats:
        errors = [entry.predict_error(store(k)) for k in range(len(entry.energy) + 3)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == (1 if entry.energy.any() else 0)
        assert errors[-1] == entry.predict_error(Stored()) == 0


@given(stats=nets, step=steps, first=shares, second=shares)
def test_more_budget_never_raises_the_knapsacks_predicted_error(
    stats: tuple[LayerStats, ...], step: int, first: float, second: float
) -> None:
    less, more = sorted((first, second))
    poor, rich = (plan_for("knapsack", stats, find_budget(stats, step, share), step) for share in (less, more))
    assert rich.predicted_error <= poor.predicted_error + SOLVER


@given(stats=nets, step=steps, share=shares)
def test_the_knapsack_is_never_worse_than_any_other_choice(
    stats: tuple[LayerStats, ...], step: int, share: float
) -> None:
    budget = find_budget(stats, step, share)
    plan = plan_for("knapsack", stats, budget, step)
    uniform = plan_for("uniform", stats, budget, step)
    assert plan.predicted_error <= uniform.predicted_error + SOLVER
    best = min(
        sum(0.0 if rank is None else entry.predict_error(store(rank)) for entry, rank in zip(stats, ranks, strict=True))
        for ranks in itertools.product(*([*entry.list_ranks(step), None] for entry in stats))
        if FIXED
        + sum(
            entry.layer.parameters if rank is None else entry.layer.count_factored(rank)
            for entry, rank in zip(stats, ranks, strict=True)
        )
        <= budget
    )
    assert plan.predicted_error == pytest.approx(best, abs=SOLVER)


@pytest.mark.parametrize(("method", "rank"), [("uniform", 3), ("strs", 3), ("knapsack", 3), ("arp", 3), ("arp", 25)])
def test_layers_with_equal_spectra_share_the_budget_exactly(method: Method, rank: int) -> None:
    stats = tuple(make_stats(f"l{index}", 64, 64, [2.0**-k for k in range(64)]) for index in range(4))
    plan = plan_for(method, stats, FIXED + 4 * rank * 128, 1)
    assert list_ranks(plan) == [rank] * 4  # at 25 the threshold's eighth digit decides
    assert plan.gap == 0


@pytest.mark.parametrize("method", METHODS)
def test_spectra_of_zeros_are_no_obstacle(method: Method) -> None:
    stats = tuple(make_stats(f"l{index}", 8, 8, [0.0] * 8) for index in range(3))
    plan = plan_for(method, stats, FIXED + 3 * 32, 2)
    assert plan.predicted_error == 0
    assert plan.gap >= 0


def test_the_knapsack_gives_ranks_where_errors_are() -> None:
    flat, steep = [1.0] * 16, [1.0] + [1e-6] * 15
    plan = plan_for("knapsack", (make_stats("flat", 16, 16, flat), make_stats("steep", 16, 16, steep)), FIXED + 288, 1)
    assert list_ranks(plan) == [None, 1]


# --- uniform -------------------------------------------------------------------------------------------------------


def test_uniform_gives_every_layer_the_same_share() -> None:
    shapes = [(8, 56), (16, 48), (32, 32), (48, 16)]  # one rank costs 64 in each
    stats = tuple(make_stats(f"l{rows}", rows, columns, [1.0] * min(rows, columns)) for rows, columns in shapes)
    plan = plan_for("uniform", stats, FIXED + sum(s.layer.parameters for s in stats) // 2, 1)
    for layer in plan.layers:
        assert abs(layer.chosen_parameters - layer.dense_parameters / 2) < 64


# --- ARP -----------------------------------------------------------------------------------------------------------


def follow_arp(plain: list[float], rows: int, columns: int, threshold: float) -> int | None:
    """ARP's steps 3 and 4, word for word."""
    k = 1
    while sum(plain[:k]) < threshold * sum(plain) - 1e-12 * sum(plain):
        k += 1
    return k if k * (rows + columns) < rows * columns else None


@given(stats=nets, threshold=st.floats(0, 1, exclude_min=True))
def test_arp_with_a_fixed_threshold_is_the_papers_rule(stats: tuple[LayerStats, ...], threshold: float) -> None:
    plan = plan_arp(stats, threshold)
    for entry, rank in zip(stats, list_ranks(plan), strict=True):
        gaps = np.abs(np.cumsum(entry.plain) - threshold * entry.plain.sum())
        assume(not entry.plain.any() or gaps.min() > 1e-9 * entry.plain.sum())  # rounding decides such a tie
        assert rank == follow_arp(entry.plain.tolist(), entry.layer.rows, entry.layer.columns, threshold)
    assert plan.budget_cost == plan.total_parameters
    assert plan.gap == 0


@given(stats=nets, first=shares, second=shares)
def test_a_larger_threshold_never_takes_fewer_parameters(
    stats: tuple[LayerStats, ...], first: float, second: float
) -> None:
    small, large = (plan_arp(stats, max(threshold, 1e-9)) for threshold in sorted((first, second)))
    assert small.total_parameters <= large.total_parameters


def test_a_threshold_of_one_keeps_all_of_the_variance() -> None:
    full, half = make_stats("full", 8, 8, [1.0] * 8), make_stats("half", 20, 20, [1.0] * 5 + [0.0] * 15)
    plan = plan_arp((full, half), 1.0)
    assert list_ranks(plan) == [None, 5]


def test_arp_goes_by_the_plain_spectrum_and_reports_the_whitened_error() -> None:
    entry = make_stats("l", 20, 20, [8.0, 1, 1] + [0.0] * 17, [5.0, 3, 2])
    plan = plan_arp((entry,), 0.8)
    assert list_ranks(plan) == [1]
    assert plan.layers[0].relative_error == 0.5


def test_arp_gives_a_layer_of_zeros_one_rank_and_the_others_the_budget() -> None:
    zero, live = make_stats("zero", 16, 16, [0.0] * 16), make_stats("live", 16, 16, [2.0**-k for k in range(16)])
    plan = plan_for("arp", (zero, live), FIXED + 32 + 5 * 32, 1)
    assert list_ranks(plan) == [1, 5]


def test_every_method_of_the_recipe_is_in_the_table() -> None:
    assert set(METHODS) == set(ALLOCATORS)
    assert set(get_args(RankMethod)) == set(RANK_METHODS)
    assert set(ALLOCATORS) == {name for name, traits in RANK_METHODS.items() if traits.reads != "model"}
