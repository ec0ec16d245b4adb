"""Adds to a rank plan what every layer loses on calibration samples that its factors have not seen, and its doubts."""

from collections.abc import Iterator
from dataclasses import replace

from rankship_pipeline.factors.analysis import Analysis
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.held_out import measure_held_out
from rankship_pipeline.foundation import profile
from rankship_pipeline.foundation.records import LayerRank, RankPlan
from rankship_pipeline.foundation.units import show_percent

# Shares of the inputs' correlations that the samples do not bear out, from which a layer is said to be in doubt.
_DOUBTFUL = 0.1


def measure_losses(plan: RankPlan, analysis: Analysis, samples: int) -> RankPlan:
    """The plan with every factored layer's loss on unseen samples, from two halves of the calibration samples."""
    layers, weighed = [], False
    for layer in plan.layers:
        with profile.layer(layer.name):
            taken = analysis.layers[layer.name]
            layers.append(_measure(layer, taken))
            weighed |= taken.metric.gram is not None
    return replace(plan, layers=tuple(layers), calibration_samples=samples if weighed else None)


def _measure(layer: LayerRank, taken: Decomposition) -> LayerRank:
    evidence = taken.metric.evidence
    makes_fewer = layer.factors is not None and layer.factors.form == "width" and layer.factors.input_rank is None
    return replace(
        layer,
        held_out_error=None if layer.factors is None or makes_fewer else measure_held_out(taken, layer.factors),
        shrinkage=None if evidence is None else evidence.intensity,
    )


def list_doubts(plan: RankPlan) -> Iterator[str]:
    """One sentence where the calibration samples were too few for the layers' inputs; none otherwise."""
    doubtful = [one for one in plan.layers if one.shrinkage is not None and one.shrinkage >= _DOUBTFUL]
    if not doubtful or plan.calibration_samples is None:
        return
    worst = max(doubtful, key=lambda one: one.shrinkage or 0.0)
    share = plan.calibration_samples / max(one.columns for one in doubtful)
    yield (
        f"{plan.calibration_samples} calibration samples are few ({share:.2g} per column of the widest layer):"
        f" {len(doubtful)} of {len(plan.layers)} layers go by their weights for part of their inputs, {worst.name} for"
        f" {show_percent(worst.shrinkage or 0.0)} of their correlations; give more samples if you have them"
    )
