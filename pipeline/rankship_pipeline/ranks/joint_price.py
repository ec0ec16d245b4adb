"""Two measured prices as one, so that the one knapsack meets a limit on each of them.

Whatever meets both limits meets their mean, whatever the two count in it: a surrogate constraint (F. Glover, Surrogate
Constraints, Operations Research 16, 1968). So the best way by a mean, if it meets both, is the best of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rankship_pipeline.foundation.records import Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.price import Price

_WHOLE = 2**30  # the weights of both in a mean add up to this, in integers: sums of costs stay exact


def share_ways(layers: Sequence[Layer], first: Price, second: Price) -> tuple[Price, Price]:
    """Both prices, measured on their own, with the same ways on offer.

    Those are what either lists and the other one can price: as the cheapest that it lists of this form and type and is
    nowhere smaller. Tables list the last rank of each stair, and below it nothing is cheaper.
    """
    costs: dict[str, dict[Stored, tuple[int, int]]] = {}
    for layer in layers:
        listed = [(price.listed or {})[layer.name] for price in (first, second)]
        found = {one: [_climb(price, layer, one) for price in (first, second)] for some in listed for one in some}
        costs[layer.name] = {
            stored: (one, two) for stored, (one, two) in found.items() if one is not None and two is not None
        }
    return _offer(first, costs, 0), _offer(second, costs, 1)


def _climb(price: Price, layer: Layer, stored: Stored) -> int | None:
    """What a way costs by its own or the next listed size; None where none is as large."""
    if (own := price.price_layer(layer, stored)) is not None:
        return own
    larger = [one for one in (price.listed or {})[layer.name] if _is_within(stored, one)]
    return min((cost for one in larger if (cost := price.price_layer(layer, one)) is not None), default=None)


def _is_within(small: Stored, large: Stored) -> bool:
    one, two = small.factors, large.factors
    if one is None or two is None or (one.form, small.weights) != (two.form, large.weights):
        return False
    return one.rank <= two.rank and (one.input_rank or 0) <= (two.input_rank or 0)


def _offer(price: Price, costs: Mapping[str, Mapping[Stored, tuple[int, int]]], place: int) -> Price:
    own = {name: {stored: pair[place] for stored, pair in some.items()} for name, some in costs.items()}
    listed = {name: list(some) for name, some in own.items()}
    return replace(price, price_layer=lambda layer, stored: own[layer.name].get(stored), listed=listed)


def mean_price(first: Price, second: Price, weight: float) -> Price:
    """The mean of two prices with the same ways on offer; the first counts by `weight`, 0 to 1, the second by the rest.

    At either end it is that price itself.
    """

    def price_layer(layer: Layer, stored: Stored) -> int | None:
        one, two = first.price_layer(layer, stored), second.price_layer(layer, stored)
        return None if one is None or two is None else _mix(one, two, weight) // _WHOLE

    fixed = _mix(first.fixed, second.fixed, weight) // _WHOLE
    return replace(first, price_layer=price_layer, fixed=fixed)


def mean_limit(first: int, second: int, weight: float) -> int:
    """The limit by such a mean: costs are rounded down, so that what meets both limits meets it."""
    return -(-_mix(first, second, weight) // _WHOLE)


def _mix(first: int, second: int, weight: float) -> int:
    share = round(weight * _WHOLE)
    return share * first + (_WHOLE - share) * second
