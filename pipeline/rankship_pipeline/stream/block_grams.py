"""Gram matrices of one decoder block's layers."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankship_pipeline.factors.shrink import pool, shrink, shrink_outputs
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.watch import watch


@dataclass(frozen=True)
class Group:
    """Linear layers of a block (names within it) that read the same tensors, and so share one Gram.

    With `by_output` it is the Gram of the single layer's outputs without bias, (rows, rows), not of its inputs.
    """

    names: tuple[str, ...]
    by_output: bool = False


def find_groups(
    block: nn.Module, names: Sequence[str], run: Callable[[], object], by_output: Collection[str]
) -> list[Group]:
    """Run the block once and group the layers that read the same tensors: query, key and value; gate and up.

    One of the layers named in `by_output`, if alone in its group, uses the Gram of its outputs.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}  # holding the tensors keeps their ids apart
    with watch(block, seen, lambda name, x, _y: seen[name].append(x)):
        run()
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in seen.items():
        if not tensors:
            raise InputError(f"layer {name} of a block never ran", hint="list it in exclude: it stays dense")
        sharing.setdefault(tuple(map(id, tensors)), []).append(name)
    return [Group(tuple(alike), by_output=len(alike) == 1 and alike[0] in by_output) for alike in sharing.values()]


@dataclass
class Grams:
    """Two uncentred Grams per group, of the even and of the odd samples, (2, n, n): float64 sums of all calls.

    Products are of float32 inputs or float64 outputs. `energies` (2, columns) are the squares of the inputs of groups
    by output; `half` is the half of which a sample is running, 0 or 1.
    """

    half: int = 0
    seconds: float = 0.0
    sums: dict[Group, Tensor] = field(default_factory=dict)
    energies: dict[Group, Tensor] = field(default_factory=dict)

    def collect(self, block: nn.Module, groups: Sequence[Group]) -> AbstractContextManager[None]:
        """Add the Grams of every call of the block until the context ends."""
        by_name = {group.names[0]: group for group in groups}

        def add(name: str, x: Tensor, y: Tensor) -> None:
            begun = time.monotonic()
            group, rows = by_name[name], x.detach().flatten(0, -2)
            if group.by_output:
                self._add(self.energies, group, rows.double().square().sum(0))
                bias: Tensor | None = block.get_submodule(name).bias  # type: ignore[assignment]  # a linear layer's
                rows = (y if bias is None else y - bias).detach().double().flatten(0, -2)
            self._add(self.sums, group, rows.T @ rows)
            self.seconds += time.monotonic() - begun

        return watch(block, by_name, add)

    def take(self, group: Group, block: nn.Module, samples: int, *, shrunk: bool) -> tuple[Tensor, float | None]:
        """Remove a group; its Gram (n, n) per sample, and the intensity by which it was shrunk (see factors/shrink.py).

        Of one sample the odd half is zero, and the even one counts twice: their mean is that of all.
        """
        halves, counts = self.take_halves(group, samples), count_halves(samples)
        energies = self.energies.pop(group, None)
        if not shrunk:
            return pool(halves), None
        if energies is None:
            found = shrink(halves, samples)
            return found.matrix, found.intensity
        weight = block.get_submodule(group.names[0]).get_parameter("weight").double()
        return shrink_outputs(weight, halves, energies / counts[:, None], samples)

    def take_halves(self, group: Group, samples: int) -> Tensor:
        """Remove a group; the Grams per sample of its two halves of the samples, (2, n, n)."""
        return self.sums.pop(group).div_(count_halves(samples)[:, None, None])

    def _add(self, sums: dict[Group, Tensor], group: Group, product: Tensor) -> None:
        if group not in sums:
            sums[group] = torch.zeros(2, *product.shape, dtype=torch.float64)
        sums[group][self.half] += product


def count_halves(samples: int) -> Tensor:
    """The numbers of even and of odd samples, (2,); of one sample the odd half is zero, and the even counts twice."""
    return torch.tensor([(samples + 1) // 2, samples // 2] if samples > 1 else [0.5, 1.0], dtype=torch.float64)
