"""Turns a merged model into compressed ones: decomposes its layers once, then fills any number of plans."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from rankship_pipeline.factors.decompose import Metric, join_metrics
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import make_weights
from rankship_pipeline.factors.neurons import sort_neurons
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Layer, as_matrix, get_layer

DECOMPOSED_BYTES = 2**31  # of what is computed from layers' weights and metrics that stays: all of a small model's


class Decompositions(Mapping[str, Decomposition]):
    """Layers' decompositions by name, of which only those used last keep what is computed from weight and metric.

    A vocabulary of 49,152 words, or 200 layers, would hold several times the model in float64.
    """

    def __init__(self, layers: Mapping[str, Decomposition], most_bytes: int = DECOMPOSED_BYTES) -> None:
        self._layers, self._most_bytes = layers, most_bytes
        self._used: dict[str, None] = {}  # names, the last used last

    def __getitem__(self, name: str) -> Decomposition:
        """One layer's decomposition; others forget, the longest unused first, while all hold too much."""
        found = self._layers[name]
        self._used.pop(name, None)
        held = {other: self._layers[other].held_bytes for other in self._used}
        excess = sum(held.values()) - self._most_bytes
        for other, nbytes in held.items():
            if excess <= 0:
                break
            self._layers[other].forget()
            del self._used[other]
            excess -= nbytes
        self._used[name] = None
        return found

    def __iter__(self) -> Iterator[str]:
        """The names in the model's order."""
        return iter(self._layers)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._layers)


@dataclass(frozen=True)
class Analysis:
    """A merged model with every factorable layer decomposed, in the model's order."""

    model: nn.Module
    layers: Mapping[str, Decomposition]


def analyse(model: nn.Module, layers: tuple[Layer, ...], metrics: Mapping[str, Metric], whitening: str) -> Analysis:
    """Decompose every layer; `whitening` is a key of decompose.WHITENINGS, a layer without a metric is plain.

    Heads that are tied to an embedding have metrics under their own names, which are joined with the embedding's.
    Where neurons may be left out (see Layer.fed_by), the model is one with its neurons in order.
    """
    model, metrics = sort_neurons(model, layers, metrics)
    layers_taken = {}
    for layer in layers:
        heads = [metrics[head.name] for head in layer.tied if head.name in metrics]
        metric, weight = join_metrics(metrics.get(layer.name, Metric()), heads), as_matrix(get_layer(model, layer.name))
        taken = Decomposition(layer=layer, weight=weight, metric=metric, whitening=whitening)
        if metric.inner is not None:
            taken = replace(taken, weight=metric.inner, outer=weight.float())
        layers_taken[layer.name] = taken
    return Analysis(model=model, layers=Decompositions(layers_taken))


def fill(analysis: Analysis, plan: Mapping[str, Factors]) -> nn.Module:
    """The model with every planned layer replaced by its best factors; batch-norm statistics are not changed."""
    model = rebuild(analysis.model, plan)
    for name, factors in plan.items():
        fill_factors(model.get_submodule(name), make_weights(analysis.layers[name], factors))
    return model
