"""Rankship's own stages on a model at hand, as the default recipe runs them, without a store."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from rankship_pipeline.evaluate.calibrate import Grams, collect_halves
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric, fit_metric
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import Layer, as_matrix, count_parameters, find_layers, get_layer
from rankship_pipeline.ranks.plan import make_plan
from rankship_pipeline.recipe.choices import FactoriseChoice, RankChoice


def list_layers(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[Layer, ...]:
    """Return the layers as a build of one model lists them."""
    return tuple(replace(layer, only_factored=True) for layer in find_layers(model, exclude))


def calibrate(model: nn.Module, inputs: Inputs, layers: Sequence[Layer]) -> tuple[Grams, Grams]:
    """Return the halves of every layer's Gram and curvature."""
    return (
        collect_halves(collect_grams, model, inputs, layers),
        collect_halves(collect_curvatures, model, inputs, layers),
    )


def decompose_and_plan(
    model: nn.Module,
    inputs: Inputs,
    statistics: tuple[Grams, Grams],
    kept: float,
    choice: RankChoice | None = None,
) -> tuple[Analysis, RankPlan]:
    """Factor every layer and choose the ranks for the share of parameters `kept`, by the default method."""
    choice = choice or RankChoice()
    grams, curvatures = statistics
    layers = list_layers(model, choice.exclude)
    metrics: dict[str, Metric] = {
        name: fit_metric(as_matrix(get_layer(model, name)), halves, curvatures.get(name), len(inputs[0]))
        for name, halves in grams.items()
    }
    analysis = analyse(model, layers, metrics, FactoriseChoice().whitening)
    dense = count_parameters(model)
    fixed = dense - sum(layer.parameters for layer in layers)
    return analysis, make_plan(analysis, choice, fixed, int(kept * dense), inputs, {})


def compress(model: nn.Module, inputs: Inputs, kept: float, choice: RankChoice | None = None) -> nn.Module:
    """Return the model compressed to a share of its parameters: calibration, factors, ranks."""
    choice = choice or RankChoice()
    statistics = calibrate(model, inputs, list_layers(model, choice.exclude))
    analysis, plan = decompose_and_plan(model, inputs, statistics, kept, choice)
    return fill(analysis, {layer.name: layer.factors for layer in plan.layers if layer.factors is not None})
