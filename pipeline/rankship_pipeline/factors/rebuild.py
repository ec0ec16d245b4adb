"""Rebuilds a model with its planned layers as chains of smaller operators."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.forms import FORMS
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.layers import Factorable, find_ties, get_layer, stores_inputs_first


class KindOfWeight(NamedTuple):
    """All that may be asked of the weight of a layer that is a chain; whoever computes with it fails."""

    dtype: torch.dtype
    device: torch.device


class Chain(nn.Sequential):
    """The operators in a layer's place; some models ask for the layer's bias, or for the type of its weight."""

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, which the last operator has."""
        found = self[-1].bias
        return found if isinstance(found, Tensor) else None

    @property
    def weight(self) -> KindOfWeight:
        """The type and place of its weights; it has no single matrix."""
        first = next(self.parameters())
        return KindOfWeight(first.dtype, first.device)


class Backwards(nn.Module):
    """A linear layer without bias, run from its outputs to its inputs: y·W with the layer's own W."""

    def __init__(self, forwards: nn.Linear) -> None:
        super().__init__()
        self.weight = forwards.weight

    def forward(self, y: Tensor) -> Tensor:
        """Map (…, out) to (…, in)."""
        return y @ self.weight


def rebuild(model: nn.Module, plan: Mapping[str, Factors]) -> nn.Module:
    """A copy of the model in which every layer of `plan` is a Sequential of its form's operators, with weights unset.

    Stride, padding and dilation go to the operators with the kernel, the bias to the last one. What is tied to an
    embedding of the plan shares its operators' weights. The same call makes the structure for a saved state dict.
    """
    factored = copy.deepcopy(model)
    _place(factored, make_chains(factored, plan))
    return factored.eval()


@contextmanager
def swap_chains(model: nn.Module, plan: Mapping[str, Factors]) -> Iterator[None]:
    """Put chains with random weights in the places of a plan's layers until the context ends; nothing is copied."""
    with torch.random.fork_rng(devices=[]):  # making a layer draws numbers
        chains = make_chains(model, plan)
    dense = {name: get_layer(model, name) for name in chains}
    try:
        _place(model, chains)
        yield
    finally:
        _place(model, dense)


def _place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def make_chains(model: nn.Module, plan: Mapping[str, Factors]) -> dict[str, Chain]:
    """The chains of a plan's layers, and of all that is tied to them, by name; nothing is replaced."""
    ties, chains = find_ties(model), dict[str, Chain]()
    for name, factors in plan.items():
        chains[name] = chain(get_layer(model, name), factors)
        for other in ties.get(name, ()):
            chains[other] = _tie(chains[name], get_layer(model, other))
    return chains


def chain(module: Factorable, factors: Factors) -> Chain:
    """The operators that replace a layer (see forms/), with its own bias, which other modules may share."""
    operators = FORMS[factors.form].make_modules(module, factors)
    _give_bias(operators[-1], module)
    return Chain(*operators)


def _tie(embedding: Chain, module: Factorable) -> Chain:
    """The chain of an embedding for a module with the same weight: as it is, or from its end to its start for a head.

    With the table T (V, k) and the projection P (d, k), the embedding looks up T·Pᵀ and the head computes (x·P)·Tᵀ.
    """
    if isinstance(module, nn.Embedding):
        return embedding
    table, projection = embedding
    assert isinstance(table, nn.Embedding) and isinstance(projection, nn.Linear)  # noqa: S101, PT018 - forms/svd.py
    outwards = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False, device="meta")
    outwards.weight = table.weight
    _give_bias(outwards, module)
    return Chain(Backwards(projection), outwards)


def _give_bias(operator: nn.Module, module: Factorable) -> None:
    bias = getattr(module, "bias", None)
    if bias is None:
        return
    kept = operator.out_features if isinstance(operator, nn.Linear) else len(bias)
    if kept < len(bias):
        bias = bias[:kept]
    operator.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())


@torch.no_grad()
def fill_factors(chained: nn.Module, weights: Sequence[Tensor]) -> None:
    """Write a form's operator weights, from forms.make_weights, into the Sequential of `chain`."""
    for operator, weight in zip(chained.children(), weights, strict=True):
        target = operator.weight
        written = weight.T if stores_inputs_first(operator) else weight
        if not isinstance(target, Tensor) or target.numel() != written.numel():
            raise BuildError(f"a factor of shape {tuple(weight.shape)} does not fit {operator}")
        target.copy_(written.reshape(target.shape))
