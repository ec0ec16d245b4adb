"""Two phases' prices as one: the same ways on offer, no way lost that meets both limits, either price at the ends."""

from itertools import product
from random import Random

import pytest

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.joint_price import mean_limit, mean_price, share_ways
from rankship_pipeline.ranks.price import Price

LAYERS = (Layer(name="a", rows=64, columns=64), Layer(name="b", rows=64, columns=64))
DENSE = Stored()


def make_way(rank: int, weights: Precision = "float32") -> Stored:
    return Stored(factors=Factors(rank=rank), weights=weights)


def make_price(costs: dict[str, dict[Stored, int]], fixed: int = 0) -> Price:
    listed = {name: list(some) for name, some in costs.items()}
    return Price("ns", lambda layer, stored: costs[layer.name].get(stored), fixed, listed, ("float32", "int8"))


def test_a_rank_inside_the_stair_of_another_table_costs_the_end_of_that_stair() -> None:
    first = make_price({"a": {DENSE: 100, make_way(8): 20, make_way(24): 60}, "b": {DENSE: 50}})
    second = make_price({"a": {DENSE: 90, make_way(16): 40, make_way(32): 70}, "b": {DENSE: 50, make_way(8): 9}})
    one, two = share_ways(LAYERS, first, second)
    costs = {way: (one.price_layer(LAYERS[0], way), two.price_layer(LAYERS[0], way)) for way in (one.listed or {})["a"]}
    assert costs == {
        DENSE: (100, 90),
        make_way(8): (20, 40),
        make_way(24): (60, 70),
        make_way(16): (60, 40),
    }, "rank 32 is no faster than dense in the first table"
    assert one.price_layer(LAYERS[0], make_way(32)) is None
    assert (one.listed or {})["b"] == (two.listed or {})["b"] == [DENSE]


def test_a_way_takes_the_stairs_of_its_own_form_and_type() -> None:
    narrow = [Stored(factors=Factors(form="width", rank=64, input_rank=size)) for size in (16, 32)]
    int8 = Stored(weights="int8")
    first = make_price({"a": {DENSE: 100, make_way(8, "int8"): 5, narrow[0]: 20, int8: 30}, "b": {DENSE: 50}})
    second = make_price({"a": {DENSE: 100, make_way(16): 9, narrow[1]: 40, int8: 35}, "b": {DENSE: 50}})
    one, two = share_ways(LAYERS, first, second)
    assert (one.listed or {})["a"] == [DENSE, narrow[0], int8], "no type or form stands in for another"
    assert two.price_layer(LAYERS[0], narrow[0]) == 40


def test_either_end_of_the_mean_is_that_price() -> None:
    first = make_price({"a": {DENSE: 101, make_way(8): 3}, "b": {DENSE: 7}}, fixed=-5)
    second = make_price({"a": {DENSE: 9, make_way(8): 2}, "b": {DENSE: 1}}, fixed=11)
    for weight, own in ((1.0, first), (0.0, second)):
        mean = mean_price(first, second, weight)
        for way in (DENSE, make_way(8)):
            assert mean.price_layer(LAYERS[0], way) == own.price_layer(LAYERS[0], way)
        assert mean.fixed == own.fixed
        assert mean.price_ways(LAYERS, {"a": make_way(8), "b": DENSE}) == own.price_dense(LAYERS) - (
            98 if own is first else 7
        )
    assert (mean_limit(40, 7, 1.0), mean_limit(40, 7, 0.0)) == (40, 7)


@pytest.mark.parametrize("seed", range(5))
def test_what_meets_both_limits_meets_their_mean(seed: int) -> None:
    """Costs of one nanosecond and of many: rounding never takes such a way away."""
    random = Random(seed)  # noqa: S311 - not for secrets
    ways = [DENSE, *(make_way(rank) for rank in (8, 16, 24))]
    costs = [{name: {way: random.randint(1, 10**size) for way in ways} for name in "ab"} for size in (1, 5)]
    first, second = (make_price(one, fixed=random.randint(-3, 3)) for one in costs)
    for one, two in product(ways, ways):
        chosen = {"a": one, "b": two}
        limits = first.price_ways(LAYERS, chosen), second.price_ways(LAYERS, chosen)
        for weight in (0.0, 0.1, 1 / 3, 0.999, 1.0):
            assert mean_price(first, second, weight).price_ways(LAYERS, chosen) <= mean_limit(*limits, weight)
