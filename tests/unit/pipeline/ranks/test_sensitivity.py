"""Measured sensitivity: curves that mean what they say, and a search around a plan that can only help."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.foundation.records import Stored
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.quantise.sizes import SIMULATED
from rankship_pipeline.ranks import sensitivity
from rankship_pipeline.ranks.allocators import allocate_knapsack, total_cost
from rankship_pipeline.ranks.plan import allocate
from rankship_pipeline.ranks.price import price_bytes
from rankship_pipeline.ranks.probing import Changes, Prober, Ratings
from rankship_pipeline.ranks.sensitivity import compare_plans, improve, measure_curves
from rankship_pipeline.ranks.stats import Choices, Curve, LayerStats, gather_stats
from rankship_pipeline.recipe.choices import RankChoice

CHOICE = RankChoice(step=1, sensitivity="kl", passes=2)
X = (torch.randn(120, 2, 6, 6, generator=torch.Generator().manual_seed(7)),)


class Net(nn.Module):
    """Layers that matter very unequally, so that measuring tells what energy does not; one hardly matters at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.side = nn.Conv2d(2, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x)) + 0.02 * torch.relu(self.side(x))
        logits: Tensor = 6 * self.head(torch.relu(self.body(y)).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    net = Net().eval()
    grams = collect_grams(net, X, find_layers(net))
    return analyse(net, find_layers(net), {name: Metric(gram=gram) for name, gram in grams.items()}, "eigen")


@pytest.fixture(scope="module")
def stats(analysis: Analysis) -> tuple[LayerStats, ...]:
    return gather_stats(analysis, CHOICE, {})


@pytest.fixture(scope="module")
def measured(analysis: Analysis, stats: tuple[LayerStats, ...]) -> tuple[LayerStats, ...]:
    return measure_curves(analysis, stats, X)


def get_curve(entry: LayerStats) -> Curve:
    assert entry.curve is not None
    return entry.curve


def measure_alone(analysis: Analysis, name: str, stored: Stored) -> float:
    """Through the operators themselves, not through their product in the dense structure."""
    factors = stored.factors
    assert factors is not None
    return measure_divergence(fill(analysis, {name: factors}), X, predict(analysis.model, X))


def test_curves_rise_with_the_error(measured: tuple[LayerStats, ...]) -> None:
    for entry in measured:
        curve = get_curve(entry)
        assert len(curve.errors) == len(curve.damages) >= 2
        assert all(left < right for left, right in pairwise(curve.errors))
        assert all(left <= right for left, right in pairwise(curve.damages))
        assert min(curve.damages) > 0


def test_a_curve_holds_what_the_factored_layer_really_does(
    analysis: Analysis, measured: tuple[LayerStats, ...]
) -> None:
    for entry in measured:
        damages = {one.error: one for one in entry.ranked}
        worst = 0.0
        for error, damage in zip(get_curve(entry).errors, get_curve(entry).damages, strict=True):
            worst = max(worst, measure_alone(analysis, entry.layer.name, damages[error].stored))
            assert damage == pytest.approx(worst, rel=1e-2, abs=1e-6)


def test_the_curve_knows_which_layer_hardly_matters(measured: tuple[LayerStats, ...]) -> None:
    stem, side = measured[0], measured[1]
    assert get_curve(stem).read(0.3) > 20 * get_curve(side).read(0.3)


def test_the_model_is_as_it_was(analysis: Analysis, stats: tuple[LayerStats, ...]) -> None:
    before = copy.deepcopy(analysis.model.state_dict())
    measure_curves(analysis, stats, X)
    chosen: Choices = {entry.layer.name: entry.candidates[0].stored for entry in stats}
    improve(analysis, stats, chosen, 10**6, CHOICE, X)
    assert all(torch.equal(value, before[name]) for name, value in analysis.model.state_dict().items())


def measure(analysis: Analysis, chosen: Choices) -> float:
    plan = {name: stored.factors for name, stored in chosen.items() if stored.factors is not None}
    return measure_divergence(fill(analysis, plan), X, predict(analysis.model, X))


def choose_badly(stats: tuple[LayerStats, ...], available: int, seed: int) -> Choices:
    """A plan within the budget that nobody would want: dense or any candidate, drawn until it fits."""
    random = np.random.default_rng(seed)
    while True:
        chosen: Choices = {}
        for entry in stats:
            menu = [entry.full, *(one.stored for one in entry.candidates)]
            chosen[entry.layer.name] = menu[random.integers(len(menu))]
        if total_cost(stats, chosen) <= available:
            return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.35, 0.6])
def test_improving_never_measures_worse_nor_costs_more_than_the_budget(
    analysis: Analysis, stats: tuple[LayerStats, ...], share: float, seed: int
) -> None:
    available = int(share * sum(entry.layer.parameters for entry in stats))
    chosen = choose_badly(stats, available, seed)
    better = improve(analysis, stats, chosen, available, CHOICE, X)
    assert list(better) == list(chosen)
    assert total_cost(stats, better) <= available
    assert measure(analysis, better) <= measure(analysis, chosen) + 1e-6


def test_a_measured_plan_is_better_than_an_unmeasured_one_and_passes_better_still(
    analysis: Analysis, stats: tuple[LayerStats, ...], measured: tuple[LayerStats, ...]
) -> None:
    available = int(0.45 * sum(entry.layer.parameters for entry in stats))
    relative, alone = (
        {layer.name: layer.stored for layer in allocate(known, 0, available, choice).layers}
        for known, choice in ((stats, replace(CHOICE, sensitivity="relative")), (measured, CHOICE))
    )
    around = improve(analysis, stats, alone, available, CHOICE, X)
    first, second, third = (measure(analysis, chosen) for chosen in (relative, alone, around))
    assert second < 0.9 * first
    assert third <= second + 1e-6


@pytest.mark.parametrize("share", [0.35, 0.6])
def test_from_a_bad_plan_measuring_around_it_finds_as_good_a_one_as_any(
    analysis: Analysis, stats: tuple[LayerStats, ...], measured: tuple[LayerStats, ...], share: float
) -> None:
    available = int(share * sum(entry.layer.parameters for entry in stats))
    alone = {layer.name: layer.stored for layer in allocate(measured, 0, available, CHOICE).layers}
    found = improve(analysis, stats, choose_badly(stats, available, 1), available, CHOICE, X)
    assert measure(analysis, found) <= 1.1 * measure(analysis, alone)


def test_without_passes_the_plan_is_kept(analysis: Analysis, stats: tuple[LayerStats, ...]) -> None:
    chosen = choose_badly(stats, 700, 3)
    assert improve(analysis, stats, chosen, 700, replace(CHOICE, passes=0), X) == chosen


def test_a_worse_find_and_one_over_the_budget_are_refused(
    analysis: Analysis, stats: tuple[LayerStats, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    available = 900
    good = {layer.name: layer.stored for layer in allocate(stats, 0, available, RankChoice(step=1)).layers}
    for offered in ({entry.layer.name: entry.candidates[0].stored for entry in stats}, dict.fromkeys(good, Stored())):
        monkeypatch.setattr(sensitivity, "allocate_knapsack", lambda *_, offered=offered: offered)
        assert improve(analysis, stats, good, available, CHOICE, X) == good


def test_a_layer_with_nothing_on_offer_has_an_empty_curve(analysis: Analysis, stats: tuple[LayerStats, ...]) -> None:
    (entry,) = measure_curves(analysis, (replace(stats[0], candidates=(), ranked=()),), X)
    assert get_curve(entry) == Curve(errors=(), damages=())
    assert get_curve(entry).read(0.5) == 0


# --- reading between the points ------------------------------------------------------------------------------------


@st.composite
def draw_curve(draw: st.DrawFn) -> Curve:
    errors = sorted(draw(st.lists(st.floats(1e-9, 1), min_size=1, max_size=6, unique=True)))
    damages = sorted(draw(st.lists(st.floats(1e-9, 50), min_size=len(errors), max_size=len(errors))))
    return Curve(errors=tuple(errors), damages=tuple(damages))


@given(draw_curve())
def test_reading_at_a_measured_error_gives_what_was_measured(curve: Curve) -> None:
    for error, damage in zip(curve.errors, curve.damages, strict=True):
        assert curve.read(error) == pytest.approx(damage, rel=1e-6)


@given(draw_curve(), st.floats(0, 1), st.floats(0, 1))
def test_reading_rises_with_the_error_and_never_leaves_what_was_measured(
    curve: Curve, first: float, second: float
) -> None:
    less, more = sorted((first, second))
    assert 0 <= curve.read(less) <= curve.read(more) * (1 + 1e-9) <= curve.damages[-1] * (1 + 2e-9)
    assert curve.read(0) == 0


@given(draw_curve(), st.floats(0, 1))
def test_below_the_first_point_damage_is_proportional_and_beyond_the_last_it_stays(curve: Curve, share: float) -> None:
    assert curve.read(share * curve.errors[0]) == pytest.approx(share * curve.damages[0], rel=1e-9, abs=1e-300)
    assert curve.read(curve.errors[-1] * (1 + share)) == pytest.approx(curve.damages[-1])


def test_between_two_points_damage_is_a_power_of_the_error() -> None:
    curve = Curve(errors=(0.01, 0.1, 0.4), damages=(1e-3, 1e-1, 2e-1))
    assert curve.read(10**-1.5) == pytest.approx(1e-2)  # half-way in logarithms: slope 2
    assert curve.read(0.2) == pytest.approx(0.1 * 2**0.5)  # slope ½


# --- as few samples and sizes as it takes --------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, int], int]]:
    """The number of changes by layer, and that of samples, of every call of `Prober.rate`."""
    calls: list[tuple[dict[str, int], int]] = []
    rate = Prober.rate

    def note(prober: Prober, changes: Changes, samples: slice) -> Ratings:
        found = rate(prober, changes, samples)
        calls.append(({name: len(some) for name, some in changes.items()}, found.answers.shape[-1]))
        return found

    monkeypatch.setattr(Prober, "rate", note)
    return calls


def test_samples_are_doubled_until_they_suffice_and_no_further(
    analysis: Analysis, stats: tuple[LayerStats, ...], counted: list[tuple[dict[str, int], int]]
) -> None:
    measure_curves(analysis, stats, X, is_sure=lambda *_: len(counted) >= 4)
    assert [samples for _, samples in counted] == [8, 8, 8, 16]
    counted.clear()
    measure_curves(analysis, stats, X, is_sure=lambda *_: False)
    assert [samples for _, samples in counted] == [8, 8, 8, 16, 32, 56]


def test_on_all_samples_the_rounds_give_what_one_round_gives(analysis: Analysis, stats: tuple[LayerStats, ...]) -> None:
    in_rounds = measure_curves(analysis, stats, X, is_sure=lambda *_: False)
    at_once = measure_curves(analysis, stats, X)
    for one, other in zip(in_rounds, at_once, strict=True):
        shared = set(get_curve(one).errors) & set(get_curve(other).errors)
        assert len(shared) >= 3
        for error in shared:
            assert get_curve(one).read(error) == pytest.approx(get_curve(other).read(error), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("power", "sizes"), [(0.9, {3}), (1.0, {3}), (0.5, {4, 5}), (2.0, {4, 5})])
def test_more_sizes_are_measured_where_damage_is_not_about_proportional_to_the_error(
    analysis: Analysis, stats: tuple[LayerStats, ...], monkeypatch: pytest.MonkeyPatch, power: float, sizes: set[int]
) -> None:
    def pretend(_prober: Prober, changes: Changes, _samples: slice) -> Ratings:
        known = {entry.layer.name: entry for entry in stats}
        nats = {name: [known[name].predict_error(one) ** power for one in some] for name, some in changes.items()}
        return Ratings({name: torch.tensor(some)[:, None, None] for name, some in nats.items()}, torch.ones(1, 1))

    monkeypatch.setattr(Prober, "rate", pretend)
    stem, *_ = measure_curves(analysis, stats, X)
    assert len(get_curve(stem).errors) in sizes
    for error in get_curve(stem).errors:
        assert get_curve(stem).read(error) == pytest.approx(error**power)


def test_samples_suffice_when_halves_ask_for_equally_good_plans(
    stats: tuple[LayerStats, ...], measured: tuple[LayerStats, ...]
) -> None:
    available = int(0.45 * sum(entry.layer.parameters for entry in stats))
    is_sure = compare_plans(allocate_knapsack, available, CHOICE)
    assert is_sure(measured, [measured, measured])
    misled = [replace(one, curve=other.curve) for one, other in zip(measured, reversed(measured), strict=True)]
    assert not is_sure(measured, [measured, misled])


def test_a_plan_from_few_samples_is_as_good_as_from_all(
    analysis: Analysis, stats: tuple[LayerStats, ...], measured: tuple[LayerStats, ...]
) -> None:
    for share in (0.35, 0.45, 0.6):
        available = int(share * sum(entry.layer.parameters for entry in stats))
        few = measure_curves(analysis, stats, X, is_sure=compare_plans(allocate_knapsack, available, CHOICE))
        plans = (allocate_knapsack(some, available, CHOICE) for some in (few, measured))
        by_few, by_all = (measure(analysis, chosen) for chosen in plans)
        assert by_few <= 1.1 * by_all


def test_a_layer_without_ranks_is_measured_at_its_types(analysis: Analysis) -> None:
    price = price_bytes(0, ("int8", "int4"), SIMULATED)
    dense = gather_stats(analysis, replace(CHOICE, forms=()), {}, price)
    measured = measure_curves(analysis, dense, X)
    for entry in measured:
        (rounded,) = entry.candidates
        assert rounded.stored == Stored(weights="int4")
        assert get_curve(entry).errors == (rounded.error,)
        assert entry.predict_damage(rounded.error, "kl") > 10 * entry.predict_damage(entry.full_error, "kl") > 0
