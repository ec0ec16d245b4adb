"""Steps in the units of the weights: a row that gives thousands moves a million times as far as one that gives milli.

Adam's steps have one size for all weights, which suits networks whose outputs are near one. The rows of a regression's
last layers have the units of its targets.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LEAST = 1e-12


def list_units(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The size of each row of every weight matrix and its bias, shaped to fit: 1 for rows as networks begin with."""
    units: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or isinstance(module, nn.Embedding):  # noqa: PLR2004
            continue
        sizes = weight.detach().flatten(1).norm(dim=1).clamp_min(_LEAST)
        units[weight] = sizes.view(-1, *[1] * (weight.ndim - 1))
        if isinstance(bias, nn.Parameter) and len(bias) == len(sizes):
            units[bias] = sizes.clone()
    return units


@contextmanager
def stepping(units: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Scale the step that is taken inside by the units."""
    before = {parameter: parameter.detach().clone() for parameter in units}
    yield
    with torch.no_grad():
        for parameter, unit in units.items():
            parameter.copy_(before[parameter] + (parameter - before[parameter]) * unit)
