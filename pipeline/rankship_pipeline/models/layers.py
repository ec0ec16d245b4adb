"""The layers that may be factored, each seen as one matrix: rows out, columns in·kh·kw."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.frozen import record

Convolution = nn.Conv1d | nn.Conv2d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d
Factorable = nn.Linear | Convolution | Transposed | nn.Embedding
Kind = Literal["linear", "convolution", "transposed convolution", "embedding"]

_KINDS: Mapping[type[Factorable], Kind] = {
    nn.Linear: "linear",
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.ConvTranspose1d: "transposed convolution",
    nn.ConvTranspose2d: "transposed convolution",
    nn.Embedding: "embedding",
}
# What a subclass must inherit to be the layer that it derives from under another name.
_COMPUTATION = ("forward", "__call__", "_conv_forward", "_output_padding", "__getattr__")
# Layers of torch whose weights are matrices, and which have no form: named where they stay dense.
_WITHOUT_FORM = (nn.Conv3d, nn.ConvTranspose3d, nn.EmbeddingBag, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)

_WIDEST = 12_288  # columns: a Gram of 1.2 GB
# A side so long, and so many times the other, is left out where nothing but the layer's own factors needs it.
_LONG, _TIMES = 1024, 2


@record
class Layer:
    """A layer as a `rows` × `columns` matrix; `parameters` counts its weight without bias.

    An embedding is a linear layer on one-hot inputs: rows are its dimension, columns its vocabulary. A transposed
    convolution is one on every input position: its rows are out·kh·kw, which are then added up where they overlap, and
    its kernel here is (1, 1). A convolution over one axis has a kernel of height 1. `inputs_first` says that its weight
    is stored with the inputs as the first axis, as embeddings, transposed convolutions and GPT-2's Conv1D store it.

    `tied` are the other modules that have an embedding's weight, each as a layer of its own: heads, whose matrix is
    this one transposed, and further embeddings. They are factored with it, as one.

    A layer that is `only_factored` is not merged, rounded or solved for other outputs: what is seen of it serves its
    own best factors alone, for which the smaller of two very different sides tells all (see decompose.reduce_side).

    Its inputs are neurons if `fed_by` names the layers whose outputs make each of them, number by number, and nothing
    else reads them: a neuron's row there and its column here may be left out together. Those layers have its name in
    `feeds`.
    """

    name: str
    rows: int
    columns: int
    kind: Kind = "linear"
    kernel: tuple[int, int] = (1, 1)
    inputs_first: bool = False
    tied: tuple["Layer", ...] = ()
    only_factored: bool = False
    fed_by: tuple[str, ...] = ()
    feeds: str | None = None

    @property
    def uses(self) -> tuple["Layer", ...]:
        """Every module that computes with the weight, as a layer that is tied to no other; itself first."""
        return (replace(self, tied=()), *self.tied)

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns

    @property
    def is_widest(self) -> bool:
        """Whether a Gram of its inputs has no place in memory."""
        return self.kind != "embedding" and self.columns > max(_WIDEST, self.rows)

    @property
    def is_wide(self) -> bool:
        """Whether the Gram of its outputs stands for that of its many inputs."""
        return self.is_widest or (self._has_one_form and self.columns >= max(_LONG, _TIMES * self.rows))

    @property
    def is_tall(self) -> bool:
        """Whether the curvature at its inputs stands for that at its many outputs."""
        return self._has_one_form and self.rows >= max(_LONG, _TIMES * self.columns)

    @property
    def _has_one_form(self) -> bool:
        """Whether only two factors, at its inputs and outputs, can take its place, and nothing else needs a side."""
        alone = self.only_factored and not self.fed_by and self.feeds is None
        return alone and self.kind in {"linear", "convolution"} and self.kernel == (1, 1)

    @property
    def channels(self) -> int:
        """Input channels of a convolution, inputs of a linear layer, vocabulary of an embedding."""
        return self.columns // (self.kernel[0] * self.kernel[1])

    def count_factored(self, rank: int) -> int:
        """Parameters of the two factors of a (channel) SVD at `rank`."""
        return rank * (self.rows + self.columns)


def find_layers(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[Layer, ...]:
    """List every layer that can become a chain of smaller operators, in the model's own order.

    Not listed, so dense: what `find_dense` names, weights computed from others (see plain_modules), and names matching
    a pattern in `exclude`. A model that is itself one layer has no name, so it cannot be replaced. An embedding and
    what is tied to it are one layer, of the first embedding's name; a pattern that matches one of them leaves out all.
    """
    shared, ties = _find_shared(model), find_ties(model)
    followers = {name for others in ties.values() for name in others}
    layers = (
        replace(describe(name, module), tied=tuple(describe(one, get_layer(model, one)) for one in ties.get(name, ())))
        for name, module in model.named_modules()
        if name
        and is_factorable(module)
        and name not in followers
        and (name in ties or id(module) not in shared)
        and not has_hooks(module)
    )
    return tuple(
        layer
        for layer in layers
        if not any(fnmatchcase(one.name, pattern) for one in layer.uses for pattern in exclude)
    )


def find_dense(model: nn.Module) -> dict[str, str]:
    """The reason why a layer with a matrix stays dense, by the names of all such layers."""
    shared, ties = _find_shared(model), find_ties(model)
    together = {name for first, others in ties.items() for name in (first, *others)}
    return {
        name: reason
        for name, module in model.named_modules()
        if (reason := _explain(module, shared=id(module) in shared and name not in together)) is not None
    }


def find_ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of the modules that share the weight of an embedding, by the name of the first such embedding.

    Only where embeddings and linear layers are all that has the weight, each under one name and without hooks.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():  # noqa: SLF001 - parameters() hides sharing
            owners.setdefault(id(parameter), []).append((key, name, module))
    ties = {}
    for some in owners.values():
        first = next((name for _, name, module in some if isinstance(module, nn.Embedding)), None)
        if len(some) > 1 and first and all(key == "weight" and _may_tie(module, names) for key, _, module in some):
            ties[first] = tuple(name for _, name, _ in some if name != first)
    return ties


def _may_tie(module: nn.Module, names: Mapping[int, int]) -> bool:
    plain = isinstance(module, nn.Embedding | nn.Linear) and is_factorable(module)
    return plain and names[id(module)] == 1 and not has_hooks(module)


def is_factorable(module: nn.Module) -> TypeGuard[Factorable]:
    """Whether a module computes what a plain linear layer, embedding or ungrouped convolution does.

    A subclass that inherits the whole computation is such a layer, and so is transformers' Conv1D.
    """
    return find_kind(module) is not None


def find_kind(module: nn.Module) -> Kind | None:
    """A factorable layer's kind; None for any other module."""
    if is_conv1d_of_transformers(module):
        return "linear"
    plain = next((one for one in _KINDS if isinstance(module, one)), None)
    if plain is None or not _inherits(module, plain) or not isinstance(module._parameters.get("weight"), Tensor):  # noqa: SLF001
        return None
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is not None or module.sparse else "embedding"
    return None if getattr(module, "groups", 1) > 1 else _KINDS[plain]


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whose weight is stored as (in, out); transformers is not imported."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _inherits(module: nn.Module, plain: type[nn.Module]) -> bool:
    kind = type(module)
    same = all(getattr(kind, name, None) is getattr(plain, name, None) for name in _COMPUTATION)
    return same and "forward" not in vars(module)


def _find_shared(model: nn.Module) -> set[int]:
    """The ids of modules under two names, and of those whose weight another module has too."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()  # noqa: SLF001 - parameters() hides sharing
        if parameter is not None
    )
    return {
        id(module)
        for module in model.modules()
        if names[id(module)] > 1 or owners[id(module._parameters.get("weight"))] > 1  # noqa: SLF001
    }


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after its forward, which may change what it computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def _explain(module: nn.Module, *, shared: bool) -> str | None:
    """Why this layer stays dense; None for one that need not, and for what is no layer with a matrix."""
    if is_factorable(module):
        hooked = "hooks may change what it computes" if has_hooks(module) else None
        return "it is used twice or shares its weight" if shared else hooked
    if isinstance(module, _WITHOUT_FORM):
        return f"{type(module).__name__} has no form"
    if not isinstance(module, tuple(_KINDS)):
        return None
    if getattr(module, "groups", 1) > 1:
        return f"its convolution is {'grouped' if module.groups < module.in_channels else 'depthwise'}"  # type: ignore[operator]
    if type(module) is nn.Embedding:
        return "it renormalises its weight, or its gradient is sparse"
    return f"{type(module).__name__} computes in its own way"


def describe(name: str, module: Factorable) -> Layer:
    """A module's shape as a matrix."""
    weight, kind = module.weight, find_kind(module) or "linear"
    first = stores_inputs_first(module)
    inputs = weight.shape[0]
    if first:
        return Layer(name=name, rows=weight.numel() // inputs, columns=inputs, kind=kind, inputs_first=True)
    kernel = (1, *weight.shape[2:])[-2:] if kind == "convolution" else (1, 1)
    return Layer(name=name, rows=inputs, columns=weight[0].numel(), kind=kind, kernel=(kernel[0], kernel[1]))


def stores_inputs_first(module: nn.Module) -> bool:
    """Whether the first axis of a layer's weight is its inputs."""
    return isinstance(module, Transposed | nn.Embedding) or is_conv1d_of_transformers(module)


def get_layer(model: nn.Module, name: str) -> Factorable:
    """The module with a name from `find_layers`."""
    module = model.get_submodule(name)
    if not is_factorable(module):
        message = f"{name} is a {type(module).__name__}, not a layer from find_layers"
        raise TypeError(message)
    return module


def as_matrix(module: Factorable) -> Tensor:
    """A layer's weight as its (rows, columns) matrix in float64."""
    return matricise(module.weight, describe("", module))


def matricise(weight: Tensor, layer: Layer) -> Tensor:
    """A weight tensor of this layer as its (rows, columns) matrix in float64."""
    flat = weight.detach().to(torch.float64).flatten(1)
    return flat.T if _is_transposed(layer) else flat


def shape_weight(matrix: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `matricise`: a (rows, columns) matrix in the shape and type of the weight `like`."""
    return (matrix.T if _is_transposed(layer) else matrix).reshape(like.shape).to(like.dtype)


def _is_transposed(layer: Layer) -> bool:
    return layer.inputs_first or layer.kind == "embedding"


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters: weights, biases, norms, embeddings, heads; shared ones once, no buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
