"""Makes the metric of every layer from what was measured on the calibration samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import Grams
from rankship_pipeline.factors.decompose import Doubts, Metric, fit_metric
from rankship_pipeline.factors.shrink import pool
from rankship_pipeline.flow.cached_stage import Kept
from rankship_pipeline.flow.prepared import Prepared
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


class Metrics(Mapping[str, Metric]):
    """Every layer's metric, made when it is asked for from the halves of Grams and curvatures in the store.

    All together would hold several times the model. What takes long to find about each is kept, and is small. A layer
    without a curvature, as a tied head, has none.
    """

    def __init__(self, prepared: Prepared, model: nn.Module, measured: Measured) -> None:
        self._model, self._shrunk = model, measured.shrunk
        self._wide = {layer.name for layer in prepared.layers if layer.is_wide}
        self._grams = [one.read() for one in measured.grams]
        self._own = None if measured.own is None else measured.own.read()
        self._curvatures = {} if measured.curvatures is None else measured.curvatures.read()
        self._samples = len(prepared.data.pool_calibration()[0])
        self._choices = all(answer.is_choice for answer in prepared.likelihood.values())
        self._doubts: dict[str, Doubts | None] = {}

    def __getitem__(self, name: str) -> Metric:
        weight, halves = as_matrix(get_layer(self._model, name)), self._read_halves(name)
        curvature = self._curvatures.get(name)
        has_units = self._shrunk and curvature is not None and not self._choices
        metric = fit_metric(
            *(weight, halves, curvature, self._samples),
            units=_measure_units(weight, pool(halves)) if has_units else None,
            shrunk=self._shrunk,
            doubts=self._doubts.get(name),
        )
        self._doubts[name] = metric.doubts
        return metric

    def __contains__(self, name: object) -> bool:
        return bool(self._grams) and name in self._grams[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._grams[0] if self._grams else ())

    def __len__(self) -> int:
        return len(self._grams[0]) if self._grams else 0

    def _read_halves(self, name: str) -> Tensor:
        """The Gram's halves, summed over the sources; a wide layer's are of its own outputs."""
        if self._own is not None and name in self._wide:
            return self._own[name]
        first, *others = (one[name] for one in self._grams)
        return sum(others, first)


def pool_inputs(grams: Grams, layers: Sequence[Layer]) -> Grams:
    """The Grams of the layers' inputs from those of two halves; a wide layer has none."""
    wide = {layer.name for layer in layers if layer.is_wide}
    return {name: pool(halves) for name, halves in grams.items() if name not in wide}


def _measure_units(weight: Tensor, gram: Tensor) -> Tensor:
    """The root of a layer's outputs' energy, row by row, without biases; a row of zeros has the layer's mean.

    The Gram is that of the inputs, or of the outputs.
    """
    if gram.shape[-1] != weight.shape[1]:
        energy = gram.diagonal()
    else:
        energy = ((weight * gram if gram.ndim == 1 else weight @ gram) * weight).sum(1).clamp_min(0)
    mean = energy.mean() if bool(energy.any()) else torch.ones(())
    return torch.where(energy > 0, energy, mean).sqrt()
