"""From a merged model to a compressed one: analyse its layers once, then allocate and factorise as often as asked."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from rankship_pipeline.calibrate import Grams
from rankship_pipeline.factorise import WHITENINGS, Spectrum, decompose_plain
from rankship_pipeline.layers import Layer, as_matrix, get_layer
from rankship_pipeline.ranks import LayerStats, allocate
from rankship_pipeline.rebuild import fill_factors, rebuild
from rankship_pipeline.recipe import RankChoice
from rankship_pipeline.records import RankPlan


@dataclass(frozen=True)
class Analysis:
    """A merged model with the spectrum and the statistics of every factorable layer."""

    model: nn.Module
    spectra: dict[str, Spectrum]
    stats: tuple[LayerStats, ...]


def analyse(
    model: nn.Module, layers: tuple[Layer, ...], grams: Grams, whitening: str, interference: dict[str, float]
) -> Analysis:
    """Decompose every layer; `whitening` is a key of factorise.WHITENINGS.

    `grams` holds every layer unless the whitening is plain; `interference` may be empty.
    """
    spectra, stats = {}, []
    for layer in layers:
        weight = as_matrix(get_layer(model, layer.name).weight)
        spectrum = WHITENINGS[whitening](weight, None if whitening == "plain" else grams[layer.name])
        plain = spectrum if whitening == "plain" else decompose_plain(weight, None)
        spectra[layer.name] = spectrum
        stats.append(
            LayerStats(
                layer=layer,
                plain=np.asarray(plain.energy),
                energy=np.asarray(spectrum.energy),
                interference=interference.get(layer.name),
            )
        )
    return Analysis(model=model, spectra=spectra, stats=tuple(stats))


def compress(
    analysis: Analysis, choice: RankChoice, fixed_parameters: int, budget_parameters: int
) -> tuple[nn.Module, RankPlan]:
    """Allocate ranks and fill the factors; batch-norm statistics stay the merged model's."""
    plan = allocate(choice.method, analysis.stats, fixed_parameters, budget_parameters, choice)
    model = rebuild(analysis.model, plan.ranks)
    fill_factors(model, plan.ranks, analysis.spectra)
    return model, plan
