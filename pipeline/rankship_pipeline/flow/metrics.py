"""Makes the metric of every layer from what was measured on the calibration samples."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import Grams
from rankship_pipeline.factors.decompose import Metric, make_metric
from rankship_pipeline.factors.shrink import pool
from rankship_pipeline.flow.cached_stage import Kept
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.foundation import profile
from rankship_pipeline.models.layers import as_matrix, get_layer


@dataclass(frozen=True)
class Measured:
    """What a way's metrics are made from: Grams to be summed, none for "plain", and perhaps curvatures."""

    grams: tuple[Kept[Grams], ...]
    curvatures: Kept[Grams] | None
    shrunk: bool

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
    each = [one.read() for one in measured.grams]
    grams = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
    curvatures = {} if measured.curvatures is None else measured.curvatures.read()
    samples = len(prepared.data.pool_calibration()[0])
    choices = all(answer.is_choice for answer in prepared.likelihood.values())
    units = {} if choices else _measure_units(model, grams)
    metrics = {}
    for name, halves in grams.items():
        with profile.layer(name):
            metrics[name] = make_metric(
                halves, curvatures.get(name), samples, units=units.get(name), shrunk=measured.shrunk
            )
    return metrics


def _measure_units(model: nn.Module, grams: Grams) -> dict[str, Tensor]:
    """The root of each layer's outputs' energy, row by row, without biases; a row of zeros has the layer's mean.

    `grams` are those of two halves of the samples.
    """
    units = {}
    for name, halves in grams.items():
        gram = pool(halves)
        matrix = as_matrix(get_layer(model, name)).double()
        energy = ((matrix * gram if gram.ndim == 1 else matrix @ gram) * matrix).sum(1).clamp_min(0)
        mean = energy.mean() if bool(energy.any()) else torch.ones(())
        units[name] = torch.where(energy > 0, energy, mean).sqrt()
    return units
