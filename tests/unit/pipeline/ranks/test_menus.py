"""Layers that share neurons are chosen together: all of them narrower, or each in a way of its own."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.allocators import allocate_knapsack, total_cost
from rankship_pipeline.ranks.menus import list_menus
from rankship_pipeline.ranks.stats import Choices, LayerStats, Offer
from rankship_pipeline.recipe.choices import RankChoice

CHOICE = RankChoice(sensitivity="gradient", forms=("svd", "width"))
FEEDERS = ("gate", "up")


def make_stats(name: str, rows: int, columns: int, seed: int, **changes: object) -> LayerStats:
    energy = np.sort(np.random.default_rng(seed).exponential(size=min(rows, columns)))[::-1].copy()
    layer = Layer(name=name, rows=rows, columns=columns, **changes)  # type: ignore[arg-type]
    ranks = [k for k in range(1, len(energy)) if layer.count_factored(k) < layer.parameters]
    tails = [float(energy[k:].sum() / energy.sum()) for k in ranks]
    offers = tuple(
        Offer(Stored(factors=Factors(rank=k)), layer.count_factored(k), tail)
        for k, tail in zip(ranks, tails, strict=True)
    )
    return LayerStats(layer=layer, plain=energy, energy=energy, candidates=offers, nats=float(seed + 1))


def make_block(seed: int) -> tuple[LayerStats, ...]:
    gate, up = (make_stats(name, 8, 5, seed + place, feeds="down") for place, name in enumerate(FEEDERS))
    down = make_stats("down", 5, 8, seed + 2, fed_by=FEEDERS)
    narrowed = tuple(
        Offer(Stored(factors=Factors(form="width", rank=5, input_rank=k)), 5 * k, (0.3 + 2 * (seed % 2)) * (1 - k / 8))
        for k in range(1, 8)
    )
    return gate, up, replace(down, narrowed=narrowed), make_stats("other", 6, 6, seed + 3)


def find_damage(stats: tuple[LayerStats, ...], chosen: Choices) -> float:
    by_name = {entry.layer.name: entry for entry in stats}
    return sum(entry.predict_damage(entry.predict_error(chosen[name]), "gradient") for name, entry in by_name.items())


def list_all(stats: tuple[LayerStats, ...]) -> list[Choices]:
    """Every plan that a model can be built from."""
    own = {entry.layer.name: [entry.full, *(one.stored for one in entry.candidates)] for entry in stats}
    plans = [dict(zip(own, ways, strict=True)) for ways in itertools.product(*own.values())]
    for one in stats[2].narrowed:
        assert one.stored.factors is not None
        made = Stored(factors=Factors(form="width", rank=one.stored.factors.input_rank or 0))
        plans += [{"gate": made, "up": made, "down": one.stored, "other": way} for way in own["other"]]
    return plans


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
def test_the_plan_is_the_best_of_all_that_can_be_built(seed: int, share: float) -> None:
    stats = make_block(seed)
    limit = int(share * sum(entry.full_cost for entry in stats))
    chosen = allocate_knapsack(stats, limit, CHOICE)
    assert total_cost(stats, chosen) <= limit
    plans = list_all(stats)
    assert chosen in plans
    best = min(find_damage(stats, one) for one in plans if total_cost(stats, one) <= limit)
    assert find_damage(stats, chosen) == pytest.approx(best, rel=1e-6)


def test_both_kinds_of_plan_occur() -> None:
    forms = set()
    for seed, share in itertools.product(range(4), (0.9, 0.7, 0.5, 0.3)):
        stats = make_block(seed)
        chosen = allocate_knapsack(stats, int(share * sum(entry.full_cost for entry in stats)), CHOICE)
        forms.add(chosen["down"].factors.form if chosen["down"].factors else "dense")
    assert forms >= {"svd", "width"}


def test_without_all_feeders_each_layer_has_its_own_menu() -> None:
    stats = make_block(0)
    menus = list_menus(stats[1:], "gradient")
    assert [len(list(menu[0].list_ways())) for menu in menus] == [1, 1, 1]
    ways = [stored for menu in menus for way in menu for _, stored in way.list_ways()]
    assert all(one.factors is None or one.factors.form == "svd" for one in ways)


def test_a_width_that_a_feeder_cannot_be_priced_at_is_not_offered() -> None:
    """As by a table of costs that were measured for other ways."""
    gate, up, down, other = make_block(0)
    listed = {one.stored for one in up.candidates} | {Stored()}
    up = replace(up, price_layer=lambda layer, stored: layer.parameters if stored in listed else None)
    (joint, _) = list_menus((gate, up, down, other), "gradient")
    forms = {one.factors.form for way in joint for _, one in way.list_ways() if one.factors}
    assert forms == {"svd"}
