"""Plans from learned ratios: the budget, and what stays dense."""

import itertools

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from make.masks import make_layer_stats
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.allocators import total_cost
from rankship_pipeline.ranks.ara import finalise
from rankship_pipeline.ranks.stats import LayerStats


@st.composite
def nets(draw: st.DrawFn) -> tuple[tuple[LayerStats, ...], dict[str, float], int]:
    """Layers with ratios, and the rank step."""
    step = draw(st.sampled_from([1, 1, 4]))
    stats, ratios = [], {}
    for index in range(draw(st.integers(1, 6))):
        rows, columns = draw(st.tuples(st.integers(1, 24), st.integers(2, 24)))
        decay = draw(st.floats(0.3, 1))
        energy = decay ** torch.arange(min(rows, columns), dtype=torch.float64)
        stats.append(make_layer_stats(Layer(name=f"l{index}", rows=rows, columns=columns), energy, step))
        ratios[f"l{index}"] = draw(st.one_of(st.floats(1e-9, 1.2), st.floats(0.98, 1.2)))
    return tuple(stats), ratios, step


def find_cheapest(stats: tuple[LayerStats, ...]) -> int:
    return sum(min([one.cost for one in entry.candidates], default=entry.layer.parameters) for entry in stats)


@given(net=nets(), share=st.floats(0, 1.1))
def test_repaired_plans_never_exceed_the_budget_and_end_within_a_step(
    net: tuple[tuple[LayerStats, ...], dict[str, float], int], share: float
) -> None:
    stats, ratios, step = net
    cheapest, total = find_cheapest(stats), sum(entry.layer.parameters for entry in stats)
    budget = cheapest + int(share * (total - cheapest))
    plan = finalise(ratios, stats, budget, repaired=True)
    left = budget - total_cost(stats, plan)
    assert left >= 0
    for entry in stats:
        factors = plan[entry.layer.name].factors
        if factors is not None:
            assert Stored(factors=factors) in [one.stored for one in entry.candidates]
            larger = entry.layer.count_factored(factors.rank + step)
            assert left < min(larger, entry.layer.parameters) - entry.layer.count_factored(factors.rank)


@given(net=nets(), share=st.floats(0, 1.1))
def test_published_plans_keep_every_dense_layer_and_scale_the_others_in_proportion(
    net: tuple[tuple[LayerStats, ...], dict[str, float], int], share: float
) -> None:
    stats, ratios, step = net
    budget = int(share * sum(entry.layer.parameters for entry in stats))
    plan = finalise(ratios, stats, budget, repaired=False)
    held = [entry for entry in stats if ratios[entry.layer.name] >= 0.99 or not entry.candidates]
    rest = [entry for entry in stats if entry not in held]
    assert all(plan[entry.layer.name] == Stored() for entry in held)
    asked = sum(ratios[entry.layer.name] * entry.layer.parameters for entry in rest)
    left = max(0, budget - sum(entry.layer.parameters for entry in held))
    for entry in rest:
        factors, largest = plan[entry.layer.name].factors, entry.candidates[-1].stored.factors
        assert factors is not None
        assert largest is not None
        exact = (
            left / asked * ratios[entry.layer.name] * entry.layer.parameters / (entry.layer.rows + entry.layer.columns)
        )
        assume(abs(exact / step - round(exact / step)) > 1e-9)
        assert factors.rank == min(largest.rank, max(step, int(exact / step) * step))


def store(rank: int) -> Stored:
    return Stored(factors=Factors(rank=rank))


def make_square(count: int, size: int = 16) -> tuple[LayerStats, ...]:
    energy = torch.ones(size, dtype=torch.float64)
    return tuple(make_layer_stats(Layer(name=f"l{index}", rows=size, columns=size), energy) for index in range(count))


def test_the_published_plan_misses_a_budget_that_its_dense_layers_eat() -> None:
    stats = make_square(4)  # 256 parameters each, 32 a rank
    ratios = {"l0": 1.02, "l1": 1.0, "l2": 0.99, "l3": 0.2}
    original = finalise(ratios, stats, 700, repaired=False)
    assert [original[name] for name in ratios] == [Stored(), Stored(), Stored(), store(1)]
    assert total_cost(stats, original) == 3 * 256 + 32 > 700
    repaired = finalise(ratios, stats, 700, repaired=True)
    assert total_cost(stats, repaired) <= 700
    assert repaired["l0"] == Stored()


def test_the_dense_layer_of_least_ratio_is_demoted_first() -> None:
    stats = make_square(3)
    for order in itertools.permutations([1.0, 1.05, 1.1]):
        ratios = {f"l{index}": ratio for index, ratio in enumerate(order)}
        plan = finalise(ratios, stats, 2 * 256 + 64, repaired=True)
        demoted = {name for name, stored in plan.items() if stored != Stored()}
        assert demoted == {min(ratios, key=ratios.__getitem__)}


def test_as_many_are_demoted_as_lose_least() -> None:
    flat, steep = torch.ones(16, dtype=torch.float64), 0.1 ** torch.arange(16, dtype=torch.float64)
    names = [Layer(name=name, rows=16, columns=16) for name in "abc"]
    stats = (make_layer_stats(names[0], steep), make_layer_stats(names[1], steep), make_layer_stats(names[2], flat))
    ratios = {"a": 1.0, "b": 1.1, "c": 0.5}
    # with both dense the flat layer is left rank 1 of 16; without them it gets 4 and they lose next to nothing
    plan = finalise(ratios, stats, 2 * 256 + 33, repaired=True)
    losses = {name: entry.predict_error(plan[name]) for name, entry in zip("abc", stats, strict=True)}
    assert plan["a"] != Stored()
    assert losses["c"] < 15 / 16
    assert losses["a"] < 0.01


def test_more_is_left_to_layers_that_ask_for_more() -> None:
    stats = make_square(2)
    plan = finalise({"l0": 0.6, "l1": 0.2}, stats, 8 * 32, repaired=True)
    assert [plan["l0"], plan["l1"]] == [store(6), store(2)]
    plan = finalise({"l0": 0.3, "l1": 0.1}, stats, 8 * 32, repaired=False)  # scaled up as well as down
    assert [plan["l0"], plan["l1"]] == [store(6), store(2)]


def test_a_budget_for_all_keeps_all_dense() -> None:
    stats = make_square(3)
    plan = finalise({"l0": 1.1, "l1": 0.3, "l2": 1e-12}, stats, 3 * 256, repaired=True)
    assert plan == dict.fromkeys(["l0", "l1", "l2"], Stored())
