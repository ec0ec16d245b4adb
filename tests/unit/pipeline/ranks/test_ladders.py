"""Ladders: which ways to store layers are measured together."""

from collections.abc import Mapping
from dataclasses import replace

from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Form
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.quantise.sizes import OFFERED
from rankship_pipeline.ranks.call_sites import Site
from rankship_pipeline.ranks.ladders import Ladder, Types, list_ladders

UP = Site(kind="linear", rows=72, columns=32, bias=False, input_shape=(1, 5, 32))
DOWN = Site(kind="linear", rows=32, columns=72, bias=False, input_shape=(1, 5, 72))


def make_block(name: str) -> list[Layer]:
    names = (f"{name}.up", f"{name}.gate")
    feeders = [Layer(name=one, rows=72, columns=32, feeds=f"{name}.down") for one in names]
    return [*feeders, Layer(name=f"{name}.down", rows=32, columns=72, fed_by=names)]


def list_of(
    layers: list[Layer],
    sites: Mapping[str, tuple[Site, ...]],
    *forms: Form,
    weights: tuple[Precision, ...] = ("float32",),
) -> list[Ladder]:
    return list_ladders(layers, sites, 24, forms, Types(weights, (OFFERED,)))


def describe(ladder: Ladder) -> list[list[str]]:
    return [[f"{'down' if site == DOWN else 'up'} {stored}" for site, stored in rung] for rung in ladder.rungs]


def test_layers_that_lose_the_same_neurons_stand_on_one_rung() -> None:
    layers = [*make_block("a"), *make_block("b")]
    sites = {one.name: (DOWN if one.fed_by else UP,) for one in layers}
    (ladder,) = list_of(layers, sites, "width")
    assert describe(ladder) == [
        ["down width 24→32", "up width 24", "up width 24"],
        ["down width 48→32", "up width 48", "up width 48"],
    ]
    assert ladder.sites == (DOWN, UP)
    assert not list_of([one for one in layers if not one.name.endswith("gate")], sites, "width")


def test_no_rung_has_a_type_that_one_of_its_layers_cannot_have() -> None:
    layers = make_block("a")
    layers[2] = replace(layers[2], columns=96)
    sites = {one.name: (DOWN if one.fed_by else UP,) for one in layers}
    found = list_ladders(layers, sites, 16, ("width",), Types(("float32", "int4"), (OFFERED,)))
    read = {ladder.weights: [rung[0][1].factors for rung in ladder.rungs] for ladder in found}
    assert [one.input_rank for one in read["float32"] if one] == [16, 32, 48, 64, 80]
    assert [one.input_rank for one in read["int4"] if one] == [32, 64], "of four bits, whole blocks are read"
    assert Types(("int4",), (OFFERED,)).list_types(Layer(name="odd", rows=9, columns=9)) == ["float32"]


def test_every_call_of_a_layer_is_measured_at_the_same_ranks_and_an_uncalled_layer_at_none() -> None:
    layer, single = Layer(name="l", rows=72, columns=64), replace(UP, input_shape=(1, 1, 16))
    (ladder,) = list_of([layer, replace(layer, name="m")], {"l": (UP, UP, single), "m": ()}, "svd")
    assert [[str(stored) for _, stored in rung] for rung in ladder.rungs] == [["svd 24"] * 3]
    assert ladder.sites == (UP, single)
