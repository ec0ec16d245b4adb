"""The data that allocation needs of every layer: spectra, candidates, sensitivities."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.decompose import measure_plain
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import Candidate, count_parameters, keep_efficient, list_candidates
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.records import Stored
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.quantise.chains import estimate_errors, measure_error
from rankship_pipeline.ranks.price import Price, PriceLayer, price_parameters
from rankship_pipeline.recipe.choices import RankChoice

Choices = dict[str, Stored]


@dataclass(frozen=True)
class Curve:
    """Measured damage (nats) of one layer at some error shares, both ascending; see sensitivity.py."""

    errors: tuple[float, ...]
    damages: tuple[float, ...]

    def read(self, error: float) -> float:
        """Damage at an error share: log-linear between the measured points, proportional below the first."""
        if error <= 0 or not self.errors:
            return 0.0
        if error <= self.errors[0]:
            return self.damages[0] * error / self.errors[0]
        logs = np.interp(np.log(error), np.log(self.errors), np.log(self.damages))
        return float(np.exp(logs))


@dataclass(frozen=True)
class Offer:
    """One way to store a layer, its cost, and the share of the layer's output energy that it loses."""

    stored: Stored
    cost: int
    error: float


@dataclass(frozen=True)
class LayerStats:
    """The data that allocation needs of one layer.

    `plain` are the σ² of its weight and `energy` those of the whitened weight, descending. `full` is its most exact
    way, dense in the most exact type on offer, which loses `full_error`. `candidates` are all efficient ways to store
    it for less, by rising cost; `price_layer` gives costs. Damage is measured on `ranked`: those of float32, which need
    not be on offer, or without any the candidates. `curve` is that damage, for the sensitivity "kl". `nats`, for a
    metric with curvature, is the predicted divergence from losing the whole layer (see calibrate.collect_curvatures).
    `narrowed` are ways to read fewer neurons; the layers that feed it then make fewer, in the same type. `dense_errors`
    are what the dense layer loses in each type.
    """

    layer: Layer
    plain: NDArray[np.float64]
    energy: NDArray[np.float64]
    candidates: tuple[Offer, ...]
    curve: Curve | None = None
    nats: float | None = None
    interference: float | None = None
    price_layer: PriceLayer = lambda layer, stored: count_parameters(layer, stored.factors)
    full: Stored = field(default_factory=Stored)
    full_error: float = 0.0
    ranked: tuple[Offer, ...] = ()
    narrowed: tuple[Offer, ...] = ()
    dense_errors: Mapping[Precision, float] = field(default_factory=dict)

    @property
    def full_cost(self) -> int:
        """The layer's cost in its most exact way."""
        return self.find_cost(self.full)

    def find_cost(self, stored: Stored) -> int:
        """What the layer costs stored so."""
        cost = self.price_layer(self.layer, stored)
        if cost is None:
            message = f"{self.layer.name} is not on offer as {stored}"
            raise KeyError(message)
        return cost

    def predict_error(self, stored: Stored) -> float:
        """Share of the output energy lost: Σ_{j>k} σ_j² / Σ σ_j² for an SVD of float32; 0 when dense in float32."""
        if stored == self.full:
            return self.full_error
        known = [one.error for one in (*self.candidates, *self.narrowed) if one.stored == stored]
        if not known and stored.factors is not None and stored.factors.form == "width":
            return self.dense_errors.get(stored.weights, 0.0)  # what it makes, it makes as before
        if known or stored.factors is None:
            return known[0] if known else 0.0
        total = float(self.energy.sum())
        return float(self.energy[stored.factors.rank :].sum()) / total if total else 0.0

    def predict_damage(self, error: float, sensitivity: str) -> float:
        """The damage of an error share, in the sensitivity's own unit (see RankChoice in recipe/choices.py)."""
        if sensitivity == "kl" and self.curve is not None:
            return self.curve.read(error)
        if sensitivity == "gradient" and self.nats is not None:
            return self.nats * error
        return error

    def list_ranks(self, step: int) -> list[int]:
        """Multiples of `step` at which an SVD is cheaper than dense, ascending; empty if there is none."""
        limit = min(self.layer.rows, self.layer.columns)
        return [k for k in range(step, limit + 1, step) if self.layer.count_factored(k) < self.layer.parameters]


def gather_stats(
    analysis: Analysis, choice: RankChoice, interference: Mapping[str, float], price: Price | None = None
) -> tuple[LayerStats, ...]:
    """Every layer's stats for the choice's ranks and forms, and the price's types; `interference` may be empty.

    Only candidates that cost less than the layer's most exact way are included. Without a price they are counted in
    parameters.
    """
    price = price or price_parameters(0)
    stats = []
    for name in analysis.layers:
        with profile.layer(name):
            stats.append(_gather(analysis.layers[name], choice, interference.get(name), price))
    return tuple(stats)


def _gather(layer: Decomposition, choice: RankChoice, interference: float | None, price: Price) -> LayerStats:
    found = list_candidates(layer, choice.step, [form for form in choice.forms if form != "width"])
    narrowed = list_candidates(layer, choice.step, [form for form in choice.forms if form == "width"])
    exact, *others = price.list_types(layer.layer)
    full = Stored(weights=exact)
    ways = {one: error for weights in (exact, *others) for one, error in _round(layer, found, weights, price)}
    dense = {weights: measure_error(layer, Stored(weights=weights)) for weights in (exact, *others)}
    ways |= {Stored(weights=weights): dense[weights] for weights in others}
    candidates = _price(layer.layer, ways, full, price)
    floats = {Stored(factors=one.factors): one.error for one in found}
    fewer = {one: error for weights in (exact, *others) for one, error in _round(layer, narrowed, weights, price)}
    return LayerStats(
        layer=layer.layer,
        plain=np.asarray(measure_plain(layer.weight)),
        energy=np.asarray(layer.spectrum.energy),
        candidates=candidates,
        ranked=_price(layer.layer, floats, Stored(), price) or candidates,
        nats=_predict_nats(layer),
        interference=interference,
        price_layer=price.price_layer,
        full=full,
        full_error=dense[exact],
        dense_errors=dense,
        narrowed=_price(layer.layer, fewer, full, price),
    )


def _price(layer: Layer, ways: Mapping[Stored, float], full: Stored, price: Price) -> tuple[Offer, ...]:
    """The efficient ones of these ways, with their errors, that can be priced and cost less than the `full` one."""
    most = price.price_layer(layer, full) or 0
    priced = ((one, price.price_layer(layer, one)) for one in ways)
    return keep_efficient(Offer(one, cost, ways[one]) for one, cost in priced if cost is not None and cost < most)


def _round(
    layer: Decomposition, found: Sequence[Candidate], weights: Precision, price: Price
) -> Iterator[tuple[Stored, float]]:
    """Float32 candidates in some type that can be priced, with the errors that they then have."""
    found = [
        one for one in found if price.price_layer(layer.layer, Stored(factors=one.factors, weights=weights)) is not None
    ]
    if weights == "float32":
        yield from ((Stored(factors=one.factors), one.error) for one in found)
        return
    for form in dict.fromkeys(one.factors.form for one in found):
        some = keep_efficient(one for one in found if one.factors.form == form)
        for one, error in zip(some, estimate_errors(layer, some, weights), strict=True):
            yield Stored(factors=one.factors, weights=weights), error


def _predict_nats(layer: Decomposition) -> float | None:
    """The predicted divergence from losing the layer; 0 if the predictions do not depend on it."""
    if layer.metric.curvature is None:
        return None
    return layer.total / 2 if bool(layer.metric.curvature.any()) else 0.0
