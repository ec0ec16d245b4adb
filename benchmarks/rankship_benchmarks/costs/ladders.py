"""Ladders: ways to store a layer, or layers that lose the same neurons, in one form and type, by rising rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rankship_pipeline.factors.forms import FORMS, list_ladder
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Factors, Form, Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.call_sites import Site

Rung = tuple[tuple[Site, Stored], ...]
IsOffered = Callable[[Layer, Stored], bool]


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
    layers: Sequence[Layer],
    sites: Mapping[str, Sequence[Site]],
    step: int,
    forms: Sequence[Form],
    types: Callable[[Layer], Sequence[Precision]],
    is_offered: IsOffered,
) -> list[Ladder]:
    """List every ladder of some layers with ranks that are multiples of `step`; layers that run alike share theirs."""
    by_name = {layer.name: layer for layer in layers}
    found = (
        Ladder(form, weights, rungs)
        for layer in layers
        for form in forms
        for weights in types(layer)
        if (rungs := tuple(_list_rungs(layer, by_name, sites, step, form, weights, is_offered)))
    )
    return list(dict.fromkeys(found))


def _list_rungs(
    layer: Layer,
    by_name: Mapping[str, Layer],
    sites: Mapping[str, Sequence[Site]],
    step: int,
    form: Form,
    weights: Precision,
    is_offered: IsOffered,
) -> Iterator[Rung]:
    """The rungs on which every part may have the type; none of a layer that is never called."""
    for parts in _list_narrowed(layer, by_name, step) if form == "width" else _list_alone(layer, step, form):
        ways = [(one, Stored(factors=factors, weights=weights)) for one, factors in parts]
        rung = tuple((site, stored) for one, stored in ways for site in sites[one.name])
        if rung and all(is_offered(one, stored) for one, stored in ways):
            yield rung


def _list_alone(layer: Layer, step: int, form: Form) -> Iterator[list[tuple[Layer, Factors]]]:
    yield from ([(layer, one)] for one in list_ladder(layer, step, form))


def _list_narrowed(layer: Layer, by_name: Mapping[str, Layer], step: int) -> Iterator[list[tuple[Layer, Factors]]]:
    """A layer that reads neurons, with those that make them; none where one of these is not among the layers."""
    feeders = [by_name[one] for one in layer.fed_by if one in by_name]
    if len(feeders) == len(layer.fed_by):
        for one in FORMS["width"].list_factors(layer, step):
            narrow = Factors(form="width", rank=one.input_rank or 0)
            yield [(layer, one), *((feeder, narrow) for feeder in feeders)]
