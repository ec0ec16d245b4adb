"""The input of a merge method: one floating-point tensor of every model at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from rankship_pipeline.models.layers import Layer, matricise, shape_weight


@dataclass(frozen=True)
class MergeInput:
    """One tensor of every model, all of the same shape and type, and what a method may use with it.

    `base` is the same tensor of the model that all were trained from, None for methods that need none. `layer` says
    how a layer's weight is seen as a matrix (None: a bias, a norm, …). `grams` (columns, columns) and `fishers`
    (shape of the tensor) have one entry per model, or none. `marks` are the survey's results, one per model's change.
    `generators` are random generators, one per model, for this tensor only.
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
        """The base's tensor, θ_0; the rules for recipes ensure that methods with a base get one."""
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
        """The task vectors as float64 matrices (rows, columns); empty if the tensor is not a layer's weight.

        Empty for embeddings too: their columns are the vocabulary.
        """
        layer = self.layer
        if layer is None or layer.kind == "embedding":
            return []
        return [matricise(change, layer) for change in self.changes]

    def average(self) -> Tensor:
        """The plain mean over the models; methods for matrices use it for biases, norms and embeddings."""
        return sum_in_order(self.values) / self.count

    def add_matrix(self, change: Tensor) -> Tensor:
        """The base plus a change that is given as a matrix (rows, columns), in the tensor's shape and type."""
        if self.layer is None:
            message = "add_matrix needs the weight of a layer"
            raise TypeError(message)
        return self.origin + shape_weight(change, self.origin, self.layer)

    @property
    def count(self) -> int:
        """The number of models."""
        return len(self.values)


def sum_in_order(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in the models' order: the same bits each time, with one tensor of memory."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def seed_generators(seed: int, name: str, count: int) -> tuple[torch.Generator, ...]:
    """One generator per model, seeded by the recipe's seed and the tensor's name, so that order does not matter."""
    found = []
    for index in range(count):
        number = int.from_bytes(sha256(f"{seed}\0{name}\0{index}".encode()).digest()[:8], "big") >> 1
        found.append(torch.Generator().manual_seed(number))
    return tuple(found)
