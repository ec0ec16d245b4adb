"""Puts the neurons between layers in order of what they add to the layer that reads them, which changes no output."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.shrink import Shrunk
from rankship_pipeline.models.layers import Layer, as_matrix, get_layer, stores_inputs_first

# Added to a Gram as a share of its diagonal, above rounding: neurons may repeat each other.
_DAMPING = 1e-5
_ROUNDS = 192  # in which neurons are left out, as many at once in each


class _Ordered(Mapping[str, Metric]):
    """Layers' metrics with their neurons in order: those that some read, and those that some make."""

    def __init__(self, metrics: Mapping[str, Metric], read: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
        self._metrics, self._read, self._made = metrics, read, made

    def __getitem__(self, name: str) -> Metric:
        metric, made = self._metrics[name], self._made.get(name)
        if name in self._read:
            metric = _permute_inputs(metric, self._read[name])
        if made is not None and metric.curvature is not None:
            metric = replace(metric, curvature=metric.curvature[made][:, made])
        return metric

    def __contains__(self, name: object) -> bool:
        return name in self._metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)


def sort_neurons(
    model: nn.Module, layers: Sequence[Layer], metrics: Mapping[str, Metric]
) -> tuple[nn.Module, Mapping[str, Metric]]:
    """A copy of the model with its neurons in order, and the layers' metrics with it; the model itself without any."""
    feeders = {layer.name: layer for layer in layers if layer.feeds is not None}
    readers = [one for one in layers if one.fed_by and one.name in metrics and feeders.keys() >= set(one.fed_by)]
    orders = {}
    for layer in readers:
        metric = metrics[layer.name]
        if metric.gram is not None:
            orders[layer] = order_neurons(as_matrix(get_layer(model, layer.name)), metric)
    if not orders:
        return model, metrics
    model = copy.deepcopy(model)
    for layer, order in orders.items():
        _permute(model, layer, order, rows=False)
        for name in layer.fed_by:
            _permute(model, feeders[name], order, rows=True)
    read = {layer.name: order for layer, order in orders.items()}
    made = {name: order for layer, order in orders.items() for name in layer.fed_by}
    return model, _Ordered(metrics, read, made)


def order_neurons(weight: Tensor, metric: Metric) -> Tensor:
    """The inputs of a weight (rows, columns), those first that the outputs lose most without.

    From all on, those are left out that cost least once the others are fitted anew: removing the columns J of W costs
    tr(W_Jᵀ·H·W_J·(P_JJ)⁻¹) with P = G⁻¹, and the others change by −W_J·(P_JJ)⁻¹·P_J: (optimal brain surgeon, Hassibi
    and Stork 1993, for whole columns: Kurtic et al. 2023, arXiv 2302.04089, §3.1).
    """
    gram = metric.gram
    assert gram is not None  # noqa: S101 - sort_neurons looked
    gram = gram.double()
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    P = torch.linalg.inv(gram + (_DAMPING * gram.diagonal().clamp_min(1e-6 * mean)).diag())
    V = weight if metric.root is None else metric.root.T @ weight
    alive, left_out = torch.arange(len(gram)), list[Tensor]()
    count = -(-len(gram) // _ROUNDS)
    while len(alive) > count:
        _, J = (V.square().sum(0) / P.diagonal()).topk(count, largest=False)
        kept = torch.ones(len(alive), dtype=torch.bool)
        kept[J] = False
        solved = torch.linalg.solve(P[J][:, J], P[J][:, kept])  # (count, others)
        left_out.append(alive[J])
        V = V[:, kept] - V[:, J] @ solved
        P = P[kept][:, kept] - P[kept][:, J] @ solved
        alive = alive[kept]
    left_out.append(alive)
    return torch.cat(left_out[::-1])


@torch.no_grad()
def _permute(model: nn.Module, layer: Layer, order: Tensor, *, rows: bool) -> None:
    """Put a layer's rows, with their biases, or its columns in this order."""
    module = get_layer(model, layer.name)
    weight = module.weight
    weight.copy_(weight.index_select(0 if rows != stores_inputs_first(module) else 1, order))
    bias = getattr(module, "bias", None)
    if rows and isinstance(bias, Tensor):
        bias.copy_(bias[order])


def _permute_inputs(metric: Metric, order: Tensor) -> Metric:
    gram, evidence = metric.gram, metric.evidence
    assert gram is not None  # noqa: S101 - sort_neurons looked
    gram = gram[order][:, order]
    if isinstance(evidence, Shrunk):
        evidence = replace(evidence, matrix=gram, halves=evidence.halves[:, order][:, :, order])
    return replace(metric, gram=gram, evidence=evidence)
