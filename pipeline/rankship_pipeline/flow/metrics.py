"""Makes the metric of every layer from what was measured on the calibration samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import Grams
from rankship_pipeline.factors.decompose import Metric, fit_metric
from rankship_pipeline.factors.shrink import pool
from rankship_pipeline.flow.cached_stage import Kept
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation import profile
from rankship_pipeline.models.layers import Layer, as_matrix, get_layer


@dataclass(frozen=True)
class Measured:
    """What a way's metrics are made from: Grams to be summed, none for "plain", and perhaps curvatures.

    Of wide layers the Grams are of outputs, and `own` has the merged model's where several are merged.
    """

    grams: tuple[Kept[Grams], ...]
    curvatures: Kept[Grams] | None
    shrunk: bool
    own: Kept[Grams] | None = None

    @property
    def key(self) -> str:
        """The hash that the compressed model depends on."""
        if not self.grams:
            return "none"
        curved = "" if self.curvatures is None else self.curvatures.content
        return "+".join(one.content for one in self.grams) + curved + ("" if self.shrunk else " whole")


def make_metrics(prepared: Prepared, model: nn.Module, measured: Measured) -> dict[str, Metric]:
    """The metrics from the halves of Grams and curvatures; a layer without a curvature, as a tied head, has none."""
    if not measured.grams:
        return {}
    wide = {layer.name for layer in prepared.layers if layer.is_wide}
    first, *others = [one.read() for one in measured.grams]
    grams = {name: sum((one[name] for one in others), gram) for name, gram in first.items()}
    if measured.own is not None:
        own = measured.own.read()
        grams.update({name: own[name] for name in wide})
    curvatures = {} if measured.curvatures is None else measured.curvatures.read()
    samples = len(prepared.data.pool_calibration()[0])
    choices = all(answer.is_choice for answer in prepared.likelihood.values())
    units = {} if choices else _measure_units(model, grams)
    metrics = {}
    for name, halves in grams.items():
        with profile.layer(name):
            weight, curvature = as_matrix(get_layer(model, name)), curvatures.get(name)
            metrics[name] = fit_metric(
                weight, halves, curvature, samples, units=units.get(name), shrunk=measured.shrunk
            )
    return metrics


def pool_inputs(grams: Grams, layers: Sequence[Layer]) -> Grams:
    """The Grams of the layers' inputs from those of two halves; a wide layer has none."""
    wide = {layer.name for layer in layers if layer.is_wide}
    return {name: pool(halves) for name, halves in grams.items() if name not in wide}


def _measure_units(model: nn.Module, grams: Grams) -> dict[str, Tensor]:
    """The root of each layer's outputs' energy, row by row, without biases; a row of zeros has the layer's mean.

    `grams` are those of two halves of the samples; of a wide layer they are of its outputs.
    """
    units = {}
    for name, halves in grams.items():
        gram = pool(halves)
        module = get_layer(model, name)
        matrix = as_matrix(module)
        if gram.shape[-1] != matrix.shape[1]:
            energy = gram.diagonal()
        else:
            energy = ((matrix * gram if gram.ndim == 1 else matrix @ gram) * matrix).sum(1).clamp_min(0)
        mean = energy.mean() if bool(energy.any()) else torch.ones(())
        units[name] = torch.where(energy > 0, energy, mean).sqrt()
    return units
