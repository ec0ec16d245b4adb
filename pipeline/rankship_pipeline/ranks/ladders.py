"""Ladders: ways to store a layer, or layers that lose the same neurons, in one form and type, by rising rank."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rankship_pipeline.factors.forms import FORMS, list_ladder
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Form, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.quantise.sizes import Offered, is_offered
from rankship_pipeline.ranks.call_sites import Site

Rung = tuple[tuple[Site, Stored], ...]


@dataclass(frozen=True)
class Types:
    """The types of weights that a recipe names, and what has to offer each of them."""

    weights: tuple[Precision, ...]
    offered: tuple[Offered, ...]

    def allow(self, layer: Layer, stored: Stored) -> bool:
        """Whether a layer may be stored so."""
        return stored.weights == "float32" or all(is_offered(layer, stored, one) for one in self.offered)

    def list_types(self, layer: Layer) -> list[Precision]:
        """The types that a layer may have, float32 where it can have no other (as price.list_types does)."""
        return [one for one in self.weights if self.allow(layer, Stored(weights=one))] or ["float32"]


@dataclass(frozen=True)
class Ladder:
    """The rungs of one form and type; each says how the layer at every one of the same sites is stored.

    A layer that is called several times has a site for each call, so that all of them are measured at the same ranks.
    """

    form: Form
    weights: Precision
    rungs: tuple[Rung, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The kinds of layer and input, each once."""
        return tuple(dict.fromkeys(site for site, _ in self.rungs[0]))


def list_ladders(
    layers: Sequence[Layer], sites: Mapping[str, Sequence[Site]], step: int, forms: Sequence[Form], types: Types
) -> list[Ladder]:
    """Every ladder of some layers with ranks that are multiples of `step`; layers that run alike share theirs."""
    by_name = {layer.name: layer for layer in layers}
    found = list[Ladder]()
    for layer in layers:
        for form in forms:
            parts = list(_list_narrowed(layer, by_name, step) if form == "width" else _list_alone(layer, step, form))
            for weights in types.list_types(layer):
                rungs = tuple(_list_rungs(parts, sites, weights, types))
                found += [Ladder(form, weights, rungs)] if rungs else []
    return list(dict.fromkeys(found))


Parts = list[tuple[Layer, Factors]]


def _list_rungs(
    all_parts: Iterable[Parts], sites: Mapping[str, Sequence[Site]], weights: Precision, types: Types
) -> Iterator[Rung]:
    """The rungs on which every part may have the type; none of a layer that is never called."""
    for parts in all_parts:
        ways = [(layer, Stored(factors=factors, weights=weights)) for layer, factors in parts]
        rung = tuple((site, stored) for layer, stored in ways for site in sites[layer.name])
        if rung and all(types.allow(layer, stored) for layer, stored in ways):
            yield rung


def _list_alone(layer: Layer, step: int, form: Form) -> Iterator[Parts]:
    yield from ([(layer, one)] for one in list_ladder(layer, step, form))


def _list_narrowed(layer: Layer, by_name: Mapping[str, Layer], step: int) -> Iterator[Parts]:
    """A layer that reads neurons, with those that make them; none where one of these is not among the layers."""
    feeders = [by_name[one] for one in layer.fed_by if one in by_name]
    if len(feeders) == len(layer.fed_by):
        for one in FORMS["width"].list_factors(layer, step):
            narrow = Factors(form="width", rank=one.input_rank or 0)
            yield [(layer, one), *((feeder, narrow) for feeder in feeders)]
