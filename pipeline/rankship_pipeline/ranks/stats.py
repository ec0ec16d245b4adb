"""The data that allocation needs of every layer: spectra, candidates, sensitivities."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.decompose import measure_plain
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import Candidate, count_parameters, keep_efficient, list_candidates
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.price import PriceLayer
from rankship_pipeline.recipe.choices import RankChoice

Choices = dict[str, Factors | None]


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
class LayerStats:
    """The data that allocation needs of one layer.

    `plain` are the σ² of its weight and `energy` those of the whitened weight, descending. `candidates` are all
    efficient ways to store it for less than dense, by rising cost; `price_layer` gives their costs. `curve` is its
    measured damage, for the sensitivity "kl". `nats`, for a metric with curvature, is the predicted divergence from
    losing the whole layer (see calibrate.collect_curvatures).
    """

    layer: Layer
    plain: NDArray[np.float64]
    energy: NDArray[np.float64]
    candidates: tuple[Candidate, ...]
    curve: Curve | None = None
    nats: float | None = None
    interference: float | None = None
    price_layer: PriceLayer = count_parameters

    @property
    def dense_cost(self) -> int:
        """The layer's cost when dense."""
        return self.find_cost(None)

    def find_cost(self, factors: Factors | None) -> int:
        """What the layer costs stored so."""
        cost = self.price_layer(self.layer, factors)
        if cost is None:
            message = f"{self.layer.name} is not on offer as {factors}"
            raise KeyError(message)
        return cost

    def predict_error(self, factors: Factors | None) -> float:
        """Share of the output energy lost: Σ_{j>k} σ_j² / Σ σ_j² for an SVD; 0 when dense."""
        if factors is None:
            return 0.0
        known = [candidate.error for candidate in self.candidates if candidate.factors == factors]
        if known:
            return known[0]
        total = float(self.energy.sum())
        return float(self.energy[factors.rank :].sum()) / total if total else 0.0

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
    analysis: Analysis,
    choice: RankChoice,
    interference: Mapping[str, float],
    price_layer: PriceLayer = count_parameters,
) -> tuple[LayerStats, ...]:
    """Every layer's stats for the choice's ranks and forms; `interference` may be empty.

    Only candidates that cost less than dense by `price_layer` are included.
    """
    stats = []
    for name, layer in analysis.layers.items():
        with profile.layer(name):
            stats.append(
                LayerStats(
                    layer=layer.layer,
                    plain=np.asarray(measure_plain(layer.weight)),
                    energy=np.asarray(layer.spectrum.energy),
                    candidates=keep_efficient(_price(layer, choice, price_layer)),
                    nats=_predict_nats(layer),
                    interference=interference.get(name),
                    price_layer=price_layer,
                )
            )
    return tuple(stats)


def _price(layer: Decomposition, choice: RankChoice, price_layer: PriceLayer) -> list[Candidate]:
    dense = price_layer(layer.layer, None) or 0
    return [
        replace(one, cost=cost)
        for one in list_candidates(layer, choice.step, choice.forms)
        if (cost := price_layer(layer.layer, one.factors)) is not None and cost < dense
    ]


def _predict_nats(layer: Decomposition) -> float | None:
    """The predicted divergence from losing the layer; 0 if the predictions do not depend on it."""
    if layer.metric.curvature is None:
        return None
    return layer.total / 2 if bool(layer.metric.curvature.any()) else 0.0
