"""The knapsack's menus: one for each layer, and one for layers together that may lose the same neurons."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rankship_pipeline.factors.forms import keep_efficient
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.ranks.stats import LayerStats


@dataclass(frozen=True)
class Way:
    """A way to store one layer or several, what it costs, and the damage that it does.

    `parts` are what it is made of: a layer's name with the way to store it, or other ways.
    """

    cost: int
    error: float
    parts: "tuple[tuple[str, Stored] | Way, ...]"

    def list_ways(self) -> Iterator[tuple[str, Stored]]:
        """Every layer's name with the way to store it."""
        for part in self.parts:
            if isinstance(part, Way):
                yield from part.list_ways()
            else:
                yield part


def list_menus(stats: Sequence[LayerStats], sensitivity: str) -> list[list[Way]]:
    """All ways to store each layer; layers that read and feed the same neurons stand in their reader's menu."""
    by_name = {entry.layer.name: entry for entry in stats}
    menus = {name: _list_own(entry, sensitivity) for name, entry in by_name.items()}
    for name, entry in by_name.items():
        feeders = [by_name[one] for one in entry.layer.fed_by if one in by_name]
        if not entry.narrowed or len(feeders) < len(entry.layer.fed_by):
            continue
        joint: Sequence[Way] = menus[name]
        for feeder in feeders:
            joint = _join(joint, menus.pop(feeder.layer.name))
        menus[name] = list(keep_efficient([*joint, *_narrow(entry, feeders, sensitivity)]))
    return list(menus.values())


def _list_own(entry: LayerStats, sensitivity: str) -> list[Way]:
    ways = [*((one.stored, one.cost, one.error) for one in entry.candidates)]
    ways.append((entry.full, entry.full_cost, entry.full_error))
    return [
        Way(cost, entry.predict_damage(error, sensitivity), ((entry.layer.name, stored),))
        for stored, cost, error in ways
    ]


def _join(left: Sequence[Way], right: Sequence[Way]) -> tuple[Way, ...]:
    """The efficient pairs; each side's efficient ways make all of them."""
    sides = keep_efficient(left), keep_efficient(right)
    return keep_efficient(
        Way(one.cost + two.cost, one.error + two.error, (one, two)) for one in sides[0] for two in sides[1]
    )


def _narrow(entry: LayerStats, feeders: Sequence[LayerStats], sensitivity: str) -> Iterator[Way]:
    """Each number of neurons that a layer may read, where those that feed it may be stored with as many."""
    for one in entry.narrowed:
        assert one.stored.factors is not None  # noqa: S101 - of the form "width"
        kept, cost = one.stored.factors.input_rank or 0, one.cost
        error = entry.predict_damage(one.error, sensitivity)
        parts = [(entry.layer.name, one.stored)]
        for feeder in feeders:
            stored = Stored(factors=Factors(form="width", rank=kept), weights=one.stored.weights)
            own = feeder.price_layer(feeder.layer, stored)
            if own is None:
                break
            cost += own
            error += feeder.predict_damage(feeder.predict_error(stored), sensitivity)
            parts.append((feeder.layer.name, stored))
        else:
            yield Way(cost, error, tuple(parts))
