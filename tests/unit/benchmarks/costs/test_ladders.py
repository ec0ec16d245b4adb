"""Ladders: what is measured together, and what it costs together."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rankship_benchmarks.costs.ladders import Ladder, list_ladders
from rankship_benchmarks.costs.probes import LIMITS, Probe, make_probes, prove
from rankship_benchmarks.costs.sweeps import join_ratios
from rankship_benchmarks.stats.estimates import Estimate
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Form, Stored
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.call_sites import Site
from rankship_targets.session.runner import HostRunner

UP = Site(kind="linear", rows=24, columns=16, bias=False, input_shape=(1, 5, 16))
DOWN = Site(kind="linear", rows=16, columns=24, bias=False, input_shape=(1, 5, 24))


def make_block(name: str) -> list[Layer]:
    names = (f"{name}.up", f"{name}.gate")
    feeders = [Layer(name=one, rows=24, columns=16, feeds=f"{name}.down") for one in names]
    return [*feeders, Layer(name=f"{name}.down", rows=16, columns=24, fed_by=names)]


def list_of(layers: list[Layer], sites: Mapping[str, tuple[Site, ...]], *forms: Form, most: int = 99) -> list[Ladder]:
    def is_offered(_layer: Layer, stored: Stored) -> bool:
        return stored.factors is None or (stored.factors.input_rank or stored.factors.rank) <= most

    return list_ladders(layers, sites, 8, forms, lambda _: ["float32"], is_offered)


def describe(ladder: Ladder) -> list[list[str]]:
    return [[f"{'down' if site == DOWN else 'up'} {stored}" for site, stored in rung] for rung in ladder.rungs]


def test_layers_that_lose_the_same_neurons_stand_on_one_rung() -> None:
    layers = [*make_block("a"), *make_block("b")]
    sites = {one.name: (DOWN if one.fed_by else UP,) for one in layers}
    (ladder,) = list_of(layers, sites, "width")
    assert describe(ladder) == [
        ["down width 8→16", "up width 8", "up width 8"],
        ["down width 16→16", "up width 16", "up width 16"],
    ]
    assert ladder.sites == (DOWN, UP)
    assert [len(one.rungs) for one in list_of(layers, sites, "width", most=8)] == [1], "every part may have its type"
    assert not list_of([one for one in layers if not one.name.endswith("gate")], sites, "width")


def test_every_call_of_a_layer_is_measured_at_the_same_ranks_and_an_uncalled_layer_at_none() -> None:
    layer, single = Layer(name="l", rows=24, columns=16), replace(UP, input_shape=(1, 1, 16))
    (ladder,) = list_of([layer, replace(layer, name="m")], {"l": (UP, UP, single), "m": ()}, "svd")
    assert [[str(stored) for _, stored in rung] for rung in ladder.rungs] == [["svd 8"] * 3]
    assert ladder.sites == (UP, single)


def at(value: float, spread: float | None = 0.1) -> Estimate:
    span = (None, None) if spread is None else (value - spread, value + spread)
    return Estimate(value=value, low=span[0], high=span[1], confidence=0.95, rounds=9)


def test_layers_together_cost_the_sum_of_their_shares() -> None:
    found = join_ratios([at(0.2), at(0.8), at(0.8)], [3.0, 1.0, 0.0])
    assert found.value == pytest.approx(0.25 * 0.8 + 0.75 * 0.2)
    assert found.low is not None
    assert found.low == pytest.approx(found.value - 0.1)
    assert join_ratios([at(0.3), at(0.3)], [1.0, 2.0]) == at(0.3)
    assert join_ratios([at(0.3), at(0.5)], [0.0, 0.0]).value == pytest.approx(0.4)
    assert join_ratios([at(0.3), at(0.5, None)], [1.0, 1.0]).low is None


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_layer_that_reads_fewer_neurons_is_timed_on_fewer(tmp_path: Path, weights: Precision) -> None:
    store, narrow = Store(tmp_path), Factors(form="width", rank=16, input_rank=8)
    ways = [Stored(), Stored(factors=narrow, weights=weights)]
    dense, narrowed = make_probes([Probe(DOWN, one, 3, "dynamic") for one in ways], "onnx", store)
    assert [one.inputs[0].shape for one in (dense, narrowed)] == [(1, 5, 24), (1, 5, 8)]
    assert narrowed.parameters == 3 * 16 * 8
    assert narrowed.key.precision == weights
    assert prove(narrowed, store, HostRunner(), LIMITS)[2].max_relative_error < 0.02
    (fed,) = make_probes([Probe(UP, Stored(factors=Factors(form="width", rank=8)), 3)], "onnx", store)
    assert (fed.inputs[0].shape, fed.outputs[0].shape, fed.parameters) == ((1, 5, 16), (1, 5, 8), 3 * 8 * 16)
