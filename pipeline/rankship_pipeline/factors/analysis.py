"""From a merged model to a compressed one: take its layers apart once, then allocate and fill as often as asked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from rankship_pipeline.factors.decompose import Metric, decompose_plain
from rankship_pipeline.factors.forms import Candidate, Decomposition, count_parameters, keep_efficient
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Layer, as_matrix, get_layer
from rankship_pipeline.ranks.allocators import LayerStats
from rankship_pipeline.ranks.price import Ask
from rankship_pipeline.recipe.choices import RankChoice


@dataclass(frozen=True)
class Analysis:
    """A merged model with every factorable layer taken apart, in the model's order."""

    model: nn.Module
    layers: Mapping[str, Decomposition]


def analyse(model: nn.Module, layers: tuple[Layer, ...], metrics: Mapping[str, Metric], whitening: str) -> Analysis:
    """Take every layer apart; `whitening` is a key of factorise.WHITENINGS, a layer without a metric is plain."""
    return Analysis(
        model=model,
        layers={
            layer.name: Decomposition(
                layer=layer,
                weight=as_matrix(get_layer(model, layer.name)),
                metric=metrics.get(layer.name, Metric()),
                whitening=whitening,
            )
            for layer in layers
        },
    )


def gather_stats(
    analysis: Analysis, choice: RankChoice, interference: Mapping[str, float], ask: Ask = count_parameters
) -> tuple[LayerStats, ...]:
    """What allocation needs, for ranks and forms as the choice has them; `interference` may be empty.

    Only what costs less than dense, as `ask` has it, is offered.
    """
    stats = []
    for name, layer in analysis.layers.items():
        is_plain = layer.metric == Metric()
        plain = layer.spectrum if is_plain else decompose_plain(layer.weight, None)
        stats.append(
            LayerStats(
                layer=layer.layer,
                plain=np.asarray(plain.energy),
                energy=np.asarray(layer.spectrum.energy),
                candidates=keep_efficient(_price(layer, choice, ask)),
                nats=_predict_nats(layer),
                interference=interference.get(name),
                ask=ask,
            )
        )
    return tuple(stats)


def _price(layer: Decomposition, choice: RankChoice, ask: Ask) -> list[Candidate]:
    dense = ask(layer.layer, None) or 0
    return [
        replace(one, cost=cost)
        for one in layer.list_candidates(choice.step, choice.forms)
        if (cost := ask(layer.layer, one.factors)) is not None and cost < dense
    ]


def _predict_nats(layer: Decomposition) -> float | None:
    """The divergence that losing the layer is predicted to bring; 0 where the predictions do not depend on it."""
    if layer.metric.curvature is None:
        return None
    return layer.total / 2 if bool(layer.metric.curvature.any()) else 0.0


def fill(analysis: Analysis, plan: Mapping[str, Factors]) -> nn.Module:
    """The model with every planned layer replaced by its best factors; batch-norm statistics stay as they were."""
    model = rebuild(analysis.model, plan)
    for name, factors in plan.items():
        fill_factors(model.get_submodule(name), analysis.layers[name].make_weights(factors))
    return model
