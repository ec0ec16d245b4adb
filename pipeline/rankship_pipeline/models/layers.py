"""The layers that may be factored, each seen as one matrix: rows out, columns in·kh·kw."""

from collections import Counter
from fnmatch import fnmatchcase
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.frozen import record

Factorable = nn.Linear | nn.Conv2d | nn.Embedding
Kind = Literal["linear", "convolution", "embedding"]


@record
class Layer:
    """A layer as a `rows` × `columns` matrix; `parameters` counts its weight without bias.

    An embedding is a linear layer on one-hot inputs: rows are its dimension, columns its vocabulary.
    """

    name: str
    rows: int
    columns: int
    kind: Kind = "linear"
    kernel: tuple[int, int] = (1, 1)

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns

    @property
    def channels(self) -> int:
        """Input channels of a convolution, inputs of a linear layer, vocabulary of an embedding."""
        return self.columns // (self.kernel[0] * self.kernel[1])

    def count_factored(self, rank: int) -> int:
        """Parameters of the two factors of a (channel) SVD at `rank`."""
        return rank * (self.rows + self.columns)


def find_layers(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[Layer, ...]:
    """List every layer that can become a chain of smaller operators, in the model's own order.

    Not listed, so dense: grouped, depthwise and transposed convolutions, weights shared between modules (tied
    embeddings and heads), modules under two names, weights computed from others (pruned, normalised), subclasses of
    layers, and names matching a pattern in `exclude`. A model that is itself one layer has no name, so it cannot be
    replaced.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():  # noqa: SLF001 - parameters() hides sharing
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return tuple(
        describe(name, module)
        for name, module in model.named_modules()
        if name
        and is_factorable(module)
        and names[id(module)] == 1
        and owners.get(id(module.weight)) == 1
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    )


def is_factorable(module: nn.Module) -> TypeGuard[Factorable]:
    """Whether a module is a plain linear layer, a plain embedding or an ungrouped, zero-padded convolution."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.sparse
    return type(module) is nn.Linear


def describe(name: str, module: Factorable) -> Layer:
    """A module's shape as a matrix."""
    if isinstance(module, nn.Embedding):
        return Layer(name=name, rows=module.embedding_dim, columns=module.num_embeddings, kind="embedding")
    rows, columns = module.weight.shape[0], module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return Layer(name=name, rows=rows, columns=columns)
    height, width = module.kernel_size
    return Layer(name=name, rows=rows, columns=columns, kind="convolution", kernel=(height, width))


def get_layer(model: nn.Module, name: str) -> Factorable:
    """The module with a name from `find_layers`."""
    module = model.get_submodule(name)
    if not is_factorable(module):
        message = f"{name} is a {type(module).__name__}, not a layer from find_layers"
        raise TypeError(message)
    return module


def as_matrix(module: Factorable) -> Tensor:
    """A layer's weight as its (rows, columns) matrix in float64; an embedding's table is transposed."""
    return matricise(module.weight, describe("", module))


def matricise(weight: Tensor, layer: Layer) -> Tensor:
    """A weight tensor of this layer as its (rows, columns) matrix in float64."""
    weight = weight.detach().to(torch.float64)
    return weight.T if layer.kind == "embedding" else weight.flatten(1)


def shape_weight(matrix: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `matricise`: a (rows, columns) matrix in the shape and type of the weight `like`."""
    return (matrix.T if layer.kind == "embedding" else matrix).reshape(like.shape).to(like.dtype)


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters: weights, biases, norms, embeddings, heads; shared ones once, no buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
