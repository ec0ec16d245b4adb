"""Prices how a layer is stored, in parameters, bytes, floating-point operations, or measured time or energy.

Allocation reads costs only through a `Price`. A measured price comes from a cost table, measured on a device for these
layers; only what is in the table is on offer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.forms import FORMS, count_parameters, list_operators, list_smallest
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import CostTable, CostUnit, Factors, Form, Stored
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.models.watch import watch
from rankship_pipeline.quantise.grid import BITS
from rankship_pipeline.quantise.sizes import OFFERED, Offered, count_bytes, is_offered

PriceLayer = Callable[[Layer, Stored], int | None]
FLOAT32: tuple[Precision, ...] = ("float32",)


@dataclass(frozen=True)
class Price:
    """Costs in one unit.

    `price_layer` gives a layer's cost stored in some way, or None if it cannot be stored so. `fixed` is the cost of the
    rest of the model. `listed` holds a table's ways by layer name; None if all can be priced. `weights` are the types
    on offer.
    """

    unit: CostUnit
    price_layer: PriceLayer
    fixed: int
    listed: Mapping[str, Sequence[Stored]] | None = None
    weights: tuple[Precision, ...] = FLOAT32

    def price_dense(self, layers: Sequence[Layer]) -> int:
        """The cost of the whole dense model in float32; `layers` are all that may be factored."""
        return self.price_ways(layers, {layer.name: Stored() for layer in layers})

    def price_ways(self, layers: Sequence[Layer], ways: Mapping[str, Stored]) -> int:
        """The cost of the whole model with every layer stored in some way."""
        return self.fixed + sum(self.price_layer(layer, ways[layer.name]) or 0 for layer in layers)

    def list_types(self, layer: Layer) -> list[Precision]:
        """The types that a layer's weights may have, float32 where it can have no other; the most exact first."""
        found = [one for one in self.weights if self._is_priced(layer, one)]
        return sorted(found or FLOAT32, key=lambda one: -BITS[one])

    def _is_priced(self, layer: Layer, weights: Precision) -> bool:
        return self.price_layer(layer, Stored(weights=weights)) is not None

    def find_smallest(self, layers: Sequence[Layer], step: int, forms: Sequence[Form]) -> int:
        """The whole model's lowest possible cost; layers lose neurons together or not at all."""
        alone = [one for one in forms if one != "width"]
        least = {layer.name: self.find_least(layer, step, alone) for layer in layers}
        by_name = {layer.name: layer for layer in layers}
        total = self.fixed + sum(least.values())
        for layer in layers if "width" in forms else ():
            group = [layer, *(by_name[one] for one in layer.fed_by if one in by_name)]
            if layer.fed_by and len(group) == 1 + len(layer.fed_by):
                own = sum(least[one.name] for one in group)
                total += min((cost - own for cost in self._price_narrowed(group, step) if cost < own), default=0)
        return total

    def _price_narrowed(self, group: Sequence[Layer], step: int) -> Iterator[int]:
        """The costs of a layer and of those that feed it with each number of neurons that all of them may have."""
        reader, *feeders = group
        for weights in self.list_types(reader):
            for one in FORMS["width"].list_factors(reader, step):
                narrow = Factors(form="width", rank=one.input_rank or 0)
                ways = [(reader, one), *((feeder, narrow) for feeder in feeders)]
                costs = [self.price_layer(layer, Stored(factors=own, weights=weights)) for layer, own in ways]
                if None not in costs:
                    yield sum(cost or 0 for cost in costs)
                    if self.listed is None:
                        break  # the fewest cost least, but for measured times

    def find_least(self, layer: Layer, step: int, forms: Sequence[Form]) -> int:
        """The layer's lowest possible cost, dense or at ranks that are multiples of `step`."""
        types = self.list_types(layer)
        if self.listed is None:
            offers = [one for way in types for one in self._list_smallest(layer, step, forms, way)]
        else:
            offers = [one for one in self.listed[layer.name] if one.weights in types and _fits(one, step, forms)]
        return min(cost for one in offers if (cost := self.price_layer(layer, one)) is not None)

    def _list_smallest(self, layer: Layer, step: int, forms: Sequence[Form], weights: Precision) -> list[Stored]:
        def is_priced(factors: Factors) -> bool:
            return self.price_layer(layer, Stored(factors=factors, weights=weights)) is not None

        smallest = list_smallest(layer, step, forms, is_priced)
        return [Stored(factors=one, weights=weights) for one in smallest]


def _fits(stored: Stored, step: int, forms: Sequence[Form]) -> bool:
    factors = stored.factors
    return factors is None or (factors.form in forms and factors.rank % step == 0)


def price_parameters(fixed: int) -> Price:
    """The price in stored parameters; `fixed` are those outside the factorable layers."""
    return Price("parameters", lambda layer, stored: count_parameters(layer, stored.factors), fixed)


def price_bytes(fixed: int, weights: tuple[Precision, ...], offered: Offered = OFFERED) -> Price:
    """The price in bytes of all weights; the `fixed` parameters outside the factorable layers take four each."""

    def price_layer(layer: Layer, stored: Stored) -> int | None:
        return count_bytes(layer, stored) if is_offered(layer, stored, offered) else None

    return Price("bytes", price_layer, 4 * fixed, weights=weights)


@dataclass(frozen=True)
class _Call:
    """The grids (rows, columns) of a layer's input and output positions in one call; n tokens are (1, n)."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]


@torch.inference_mode()
def price_flops(model: nn.Module, layers: Sequence[Layer], inputs: Inputs) -> Price:
    """The price in floating-point operations on one sample, two per multiply-add, as torch's own counter counts."""
    from torch.utils.flop_counter import FlopCounterMode

    kinds = {use.name: use.kind for layer in layers for use in layer.uses}
    calls: dict[str, list[_Call]] = {name: [] for name in kinds}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        if kinds[name] == "convolution":
            calls[name].append(_Call(_find_grid(x), _find_grid(y)))
        else:
            tokens = (1, x.shape[2:].numel() if kinds[name] == "transposed convolution" else y[..., 0].numel())
            calls[name].append(_Call(tokens, tokens))

    with watch(model, kinds, note), FlopCounterMode(display=False) as counter:
        model(*(tensor[:1] for tensor in inputs))

    def price_layer(layer: Layer, stored: Stored) -> int:
        return sum(_count_flops(use, stored.factors, call) for use in layer.uses for call in calls[use.name])

    return Price("flops", price_layer, counter.get_total_flops() - sum(price_layer(one, Stored()) for one in layers))


def price_table(
    table: CostTable, layers: Sequence[Layer], model_sha256: str, where: str, weights: tuple[Precision, ...] = FLOAT32
) -> Price:
    """The price from a cost table; InputError naming `where` if it is another model's (see call_sites.hash_model).

    Of the `weights` those are on offer that the table has costs of, and float32 where it has costs of none.
    """
    costs = {name: {one.stored: one.cost for one in options} for name, options in table.layers.items()}
    missing = [layer.name for layer in layers if Stored() not in costs.get(layer.name, {})]
    if missing:
        raise InputError(
            f"{where} has no dense cost of {', '.join(missing)}",
            hint="it was measured for another model or without these layers: run `rankship costs` with this recipe",
        )
    if table.model_sha256 != model_sha256:
        raise InputError(
            f"{where} was measured for a model of other shapes ({table.model_sha256[:12]}…, not {model_sha256[:12]}…)",
            hint="run `rankship costs` with this recipe",
        )
    listed = {name: list(options) for name, options in costs.items()}
    kept_dense = costs.keys() - {layer.name for layer in layers}  # the recipe keeps these dense
    fixed = table.fixed + sum(costs[name].get(Stored()) or 0 for name in kept_dense)
    return Price(table.unit, lambda layer, stored: costs[layer.name].get(stored), fixed, listed, weights)


def read_table(path: Path, unit: CostUnit) -> CostTable:
    """Read a cost table, which must be in the budget's unit."""
    try:
        text = path.read_bytes()
    except OSError as failure:
        raise InputError(f"budget.costs: cannot read {path}: {failure.strerror}", hint="name a cost table") from None
    table = decode(CostTable, text, where=str(path))
    if table.unit != unit:
        raise InputError(f"{path} holds {table.unit}, the budget is in {unit}", hint="name a table of the same unit")
    return table


def _find_grid(x: Tensor) -> tuple[int, int]:
    """The positions of images (n, channels, height, width) or of sequences (n, channels, length)."""
    height, width = (1, *x.shape[2:])[-2:]
    return height, width


def _count_flops(layer: Layer, factors: Factors | None, call: _Call) -> int:
    """Two operations per weight and position."""
    total = 0
    for operator in list_operators(layer, factors):
        high, wide = (
            after if strided else before
            for strided, before, after in zip(operator.on_outputs, call.inputs, call.outputs, strict=True)
        )
        total += 2 * operator.elements * high * wide
    return total
