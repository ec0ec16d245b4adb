"""What a merge method sees of the models: one floating-point tensor of each at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from rankship_pipeline.models.layers import Layer, matricise, shape_weight


@dataclass(frozen=True)
class MergeInput:
    """One tensor of every model, all of one shape and type, and what a method may know of it.

    `base` is the same tensor of the model that all were trained from, None for methods that need none. `layer` says
    how the weight of a layer is seen as a matrix (None: a bias, a norm, …). `grams` (columns, columns) and `fishers`
    (shape of the tensor) have one entry per model, or none. `marks` are what the method's survey found in each model's
    change. `generators` are each model's own source of chance, for this tensor alone.
    """

    values: tuple[Tensor, ...]
    settings: Mapping[str, float]
    base: Tensor | None = None
    layer: Layer | None = None
    grams: tuple[Tensor, ...] = ()
    fishers: tuple[Tensor, ...] = ()
    marks: tuple[float, ...] = ()
    generators: tuple[torch.Generator, ...] = ()

    @property
    def origin(self) -> Tensor:
        """The base's tensor, θ_0; recipes without one never come here with a method that asks for it."""
        if self.base is None:
            message = "a method that needs a base was given none"
            raise TypeError(message)
        return self.base

    @property
    def changes(self) -> list[Tensor]:
        """Each model's task vector for this tensor, τ_t = θ_t − θ_0."""
        return [value - self.origin for value in self.values]

    @property
    def matrix_changes(self) -> list[Tensor]:
        """The task vectors as float64 matrices (rows, columns); empty where the tensor is no matrix worth the name.

        Embeddings are none either: their columns are the vocabulary.
        """
        layer = self.layer
        if layer is None or layer.kind == "embedding":
            return []
        return [matricise(change, layer) for change in self.changes]

    def average(self) -> Tensor:
        """The plain mean over the models: also what methods for matrices do with biases, norms and embeddings."""
        return sum_in_order(self.values) / self.count

    def add_matrix(self, change: Tensor) -> Tensor:
        """The base plus a change given as a matrix (rows, columns), in the tensor's shape and type."""
        if self.layer is None:
            message = "only the weight of a layer is a matrix"
            raise TypeError(message)
        return self.origin + shape_weight(change, self.origin, self.layer)

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self.values)


def sum_in_order(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, in the models' order: the same bits each time, and one tensor of memory."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def seed_generators(seed: int, name: str, count: int) -> tuple[torch.Generator, ...]:
    """One source of chance per model, by the recipe's seed and the tensor's name: order and chunking change nothing."""
    found = []
    for index in range(count):
        number = int.from_bytes(sha256(f"{seed}\0{name}\0{index}".encode()).digest()[:8], "big") >> 1
        found.append(torch.Generator().manual_seed(number))
    return tuple(found)
