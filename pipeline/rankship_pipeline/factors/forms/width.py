"""width: a linear layer without its last neurons, as one smaller linear layer; no operator is added.

Neurons lie between layers: those that feed a layer lose the rows of the neurons that it loses as columns (see
Layer.fed_by), so that all of them take this form together. Only the layer that reads the neurons loses anything. Its
other columns are fitted anew to its outputs: M = W·G·Tᵀ(T·G·Tᵀ)⁻¹ with T the first rows of the identity (Nyström;
MoDeGPT, Lin et al. 2024, arXiv 2408.09632, §3.2). The neurons are in order of what they add, see neurons.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.operators import Operator
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Factorable, Layer, describe


def list_factors(layer: Layer, step: int) -> Iterator[Factors]:
    """Every number of neurons that a layer may read, below all of them; none where its inputs are no neurons."""
    kept = range(step, layer.columns, step) if layer.fed_by else ()
    return (Factors(form="width", rank=layer.rows, input_rank=k) for k in kept)


def list_operators(layer: Layer, factors: Factors) -> tuple[Operator, ...]:
    """(rank, input_rank)."""
    return (Operator(factors.rank, factors.input_rank or layer.columns),)


def measure_errors(taken: Decomposition, step: int) -> Iterator[tuple[Factors, float]]:
    """The share of the output energy that no fit on the first neurons holds."""
    known = list(list_factors(taken.layer, step))
    if not known:
        return
    held = taken.remember(_hold_neurons)
    for one in known:
        yield one, max(0.0, 1 - float(held[(one.input_rank or 0) - 1])) if taken.total else 0.0


def make_weights(taken: Decomposition, factors: Factors) -> tuple[Tensor]:
    """(rank, input_rank), or (rank, columns)."""
    weight = taken.weight
    if factors.input_rank is not None:
        weight = taken.fit(torch.eye(weight.shape[1], dtype=weight.dtype)[: factors.input_rank])
    return (weight[: factors.rank],)


def compose(layer: Layer, weights: Sequence[Tensor]) -> Tensor:
    """The weight with zeros in place of the last rows and columns."""
    (weight,) = weights
    return nn.functional.pad(weight, (0, layer.columns - weight.shape[1], 0, layer.rows - weight.shape[0]))


def make_modules(module: Factorable, factors: Factors) -> list[nn.Module]:
    """A smaller linear layer."""
    has_bias = getattr(module, "bias", None) is not None
    return [nn.Linear(factors.input_rank or describe("", module).columns, factors.rank, bias=has_bias)]


def _hold_neurons(taken: Decomposition) -> Tensor:
    """The share of the output energy that the best fit on the first neurons holds, for every number of them."""
    added = taken.hold(torch.eye(taken.weight.shape[1], dtype=taken.weight.dtype)).square().sum(0)
    return added.cumsum(0) / (taken.total or 1.0)
