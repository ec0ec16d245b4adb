"""Turns a merged model into compressed ones: decomposes its layers once, then fills any number of plans."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from rankship_pipeline.factors.decompose import Metric, join_metrics
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.forms import make_weights
from rankship_pipeline.factors.neurons import sort_neurons
from rankship_pipeline.factors.rebuild import fill_factors, rebuild
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Layer, as_matrix, get_layer

# Of weights, metrics and what is computed from them that stays: all of a small model's.
DECOMPOSED_BYTES = 2**30


class Decompositions(Mapping[str, Decomposition]):
    """Layers' decompositions by name, each made when it is asked for; as many stay as there is place for.

    A vocabulary of 49,152 words, or 200 layers, would hold several times the model in float64. Layers are gone through
    in the same order again and again: the one used last is needed last, and is the first to go. `described` are the
    layers themselves.
    """

    def __init__(
        self, layers: Sequence[Layer], make: Callable[[Layer], Decomposition], most_bytes: int = DECOMPOSED_BYTES
    ) -> None:
        self.described = {layer.name: layer for layer in layers}
        self._make, self._most_bytes = make, most_bytes
        self._held: dict[str, Decomposition] = {}  # the last used last

    def __getitem__(self, name: str) -> Decomposition:
        """One layer's decomposition; others go while all hold too much."""
        found = self._held.pop(name, None)
        held = {other: one.held_bytes for other, one in reversed(self._held.items())}
        excess = sum(held.values()) + (0 if found is None else found.held_bytes) - self._most_bytes
        for other, nbytes in held.items():
            if excess <= 0:
                break
            del self._held[other]
            excess -= nbytes
        found = self._make(self.described[name]) if found is None else found
        self._held[name] = found
        return found

    def __contains__(self, name: object) -> bool:
        """Whether there is such a layer, which is not decomposed for that."""
        return name in self.described

    def __iter__(self) -> Iterator[str]:
        """The names in the model's order."""
        return iter(self.described)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.described)


@dataclass(frozen=True)
class Analysis:
    """A merged model with the decompositions of its factorable layers, in the model's order."""

    model: nn.Module
    layers: Decompositions


def analyse(model: nn.Module, layers: tuple[Layer, ...], metrics: Mapping[str, Metric], whitening: str) -> Analysis:
    """The layers to decompose; `whitening` is a key of decompose.WHITENINGS, a layer without a metric is plain.

    Heads that are tied to an embedding have metrics under their own names, which are joined with the embedding's.
    Where neurons may be left out (see Layer.fed_by), the model is one with its neurons in order.
    """
    model, metrics = sort_neurons(model, layers, metrics)

    def make(layer: Layer) -> Decomposition:
        own = metrics[layer.name] if layer.name in metrics else Metric()
        metric = join_metrics(own, [metrics[head.name] for head in layer.tied if head.name in metrics])
        weight = as_matrix(get_layer(model, layer.name))
        if metric.inner is not None:
            return Decomposition(layer, metric.inner, metric, whitening, outer=weight.float())
        return Decomposition(layer, weight, metric, whitening)

    return Analysis(model, Decompositions(layers, make))


def fill(analysis: Analysis, plan: Mapping[str, Factors]) -> nn.Module:
    """The model with every planned layer replaced by its best factors; batch-norm statistics are not changed."""
    model = rebuild(analysis.model, plan)
    for name, factors in plan.items():
        fill_factors(model.get_submodule(name), make_weights(analysis.layers[name], factors))
    return model
