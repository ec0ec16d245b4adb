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
from rankship_pipeline.models.layers import Factorable, get_layer, stores_inputs_first


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


def rebuild(model: nn.Module, plan: Mapping[str, Factors]) -> nn.Module:
    """A copy of the model in which every layer of `plan` is a Sequential of its form's operators, with weights unset.

    Stride, padding and dilation go to the operators with the kernel, the bias to the last one. The same call makes the
    structure for a saved state dict.
    """
    factored = copy.deepcopy(model)
    _place(factored, {name: chain(get_layer(factored, name), factors) for name, factors in plan.items()})
    return factored.eval()


@contextmanager
def swap_chains(model: nn.Module, plan: Mapping[str, Factors]) -> Iterator[None]:
    """Put chains with random weights in the places of a plan's layers until the context ends; nothing is copied."""
    dense = {name: get_layer(model, name) for name in plan}
    with torch.random.fork_rng(devices=[]):  # making a layer draws numbers
        chains = {name: chain(layer, plan[name]) for name, layer in dense.items()}
    try:
        _place(model, chains)
        yield
    finally:
        _place(model, dense)


def _place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def chain(module: Factorable, factors: Factors) -> Chain:
    """The operators that replace a layer (see forms/), with its bias."""
    operators = FORMS[factors.form].make_modules(module, factors)
    bias = getattr(module, "bias", None)
    if bias is not None:
        operators[-1].bias = nn.Parameter(bias.detach().clone())
    return Chain(*operators)


@torch.no_grad()
def fill_factors(chained: nn.Module, weights: Sequence[Tensor]) -> None:
    """Write a form's operator weights, from forms.make_weights, into the Sequential of `chain`."""
    for operator, weight in zip(chained.children(), weights, strict=True):
        target = operator.weight
        written = weight.T if stores_inputs_first(operator) else weight
        if not isinstance(target, Tensor) or target.numel() != written.numel():
            raise BuildError(f"a factor of shape {tuple(weight.shape)} does not fit {operator}")
        target.copy_(written.reshape(target.shape))
