"""The layers that may be factored, each seen as one matrix: rows out, columns in·kh·kw."""

from collections import Counter
from fnmatch import fnmatchcase
from typing import TypeGuard

import torch
from torch import Tensor, nn

from rankship_pipeline.records import record


@record
class Layer:
    """A linear or convolutional layer as a `rows` × `columns` matrix; `parameters` counts its weight without bias."""

    name: str
    rows: int
    columns: int

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns

    def count_factored(self, rank: int) -> int:
        """Parameters of the two factors at `rank`."""
        return rank * (self.rows + self.columns)


def find_layers(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[Layer, ...]:
    """List every layer that can become two operators, in the model's own order.

    Left dense knowingly: grouped and transposed convolutions, weights shared between modules (tied), modules under
    two names, weights computed from others (pruned, normalised), subclasses with a forward of their own, and names
    matching a pattern in `exclude`. A model that is itself one layer has no name to replace it under.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():  # noqa: SLF001 - parameters() hides sharing
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return tuple(
        Layer(name=name, rows=module.weight.shape[0], columns=module.weight[0].numel())
        for name, module in model.named_modules()
        if name
        and is_factorable(module)
        and names[id(module)] == 1
        and owners.get(id(module.weight)) == 1
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    )


def is_factorable(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Tell whether a module is a plain linear layer or an ungrouped, zero-padded convolution."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) is nn.Linear


def get_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The module behind a name from `find_layers`."""
    module = model.get_submodule(name)
    if not is_factorable(module):
        message = f"{name} is a {type(module).__name__}, not a layer that find_layers gave"
        raise TypeError(message)
    return module


def as_matrix(weight: Tensor) -> Tensor:
    """See a weight (out, in) or (out, in, kh, kw) as a (rows, columns) matrix in float64."""
    return weight.detach().to(torch.float64).flatten(1)


def count_parameters(model: nn.Module) -> int:
    """All trainable parameters: weights, biases, norms, embeddings, heads; shared ones once, buffers not."""
    return sum(parameter.numel() for parameter in model.parameters())
