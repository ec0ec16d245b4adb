"""Gram matrices of one decoder block's layers, and the files of hidden states between blocks."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import publish_file
from rankship_pipeline.models.watch import watch


def write_hidden(path: Path, parts: Iterable[Tensor]) -> None:
    """Write hidden states (samples, positions, width) part by part as raw float32."""
    with publish_file(path) as temporary, temporary.open("wb") as stream:
        for part in parts:
            part.contiguous().numpy().tofile(stream)


def read_hidden(path: Path, shape: Sequence[int], start: int, count: int) -> Tensor:
    """Hidden states of some samples of a file for `shape` (samples, positions); read, not mapped, to save memory."""
    each = path.stat().st_size // (4 * shape[0])  # numbers of one sample
    numbers = np.fromfile(path, np.float32, count=count * each, offset=4 * start * each)
    return torch.from_numpy(numbers).reshape(count, shape[1], -1)


@dataclass(frozen=True)
class Group:
    """Linear layers of a block (names within it) that read the same tensors, and so share one Gram.

    With `by_output` it is the Gram of the single layer's outputs without bias, (rows, rows), not of its inputs.
    """

    names: tuple[str, ...]
    by_output: bool = False


def find_groups(block: nn.Module, names: Sequence[str], run: Callable[[], object], *, outputs: bool) -> list[Group]:
    """Run the block once and group the layers that read the same tensors: query, key and value; gate and up.

    With `outputs`, a layer alone in its group with fewer outputs than inputs uses the Gram of its outputs.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}  # holding the tensors keeps their ids apart
    with watch(block, seen, lambda name, x, _y: seen[name].append(x)):
        run()
    sharing: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in seen.items():
        if not tensors:
            raise InputError(f"layer {name} of a block never ran", hint="list it in exclude: it stays dense")
        sharing.setdefault(tuple(map(id, tensors)), []).append(name)
    groups = []
    for alike in sharing.values():
        rows, columns = block.get_submodule(alike[0]).get_parameter("weight").shape
        groups.append(Group(tuple(alike), by_output=outputs and len(alike) == 1 and rows < columns))
    return groups


@dataclass
class Grams:
    """One uncentred Gram per group, summed over all calls: float64 sums of float32 inputs' or float64 outputs'."""

    seconds: float = 0.0
    sums: dict[Group, Tensor] = field(default_factory=dict)

    def collect(self, block: nn.Module, groups: Sequence[Group]) -> AbstractContextManager[None]:
        """Add the Grams of every call of the block until the context ends."""
        by_name = {group.names[0]: group for group in groups}

        def add(name: str, x: Tensor, y: Tensor) -> None:
            begun = time.monotonic()
            group = by_name[name]
            if group.by_output:
                bias: Tensor | None = block.get_submodule(name).bias  # type: ignore[assignment]  # a linear layer's
                x = (y if bias is None else y - bias).double()
            rows = x.flatten(0, -2)
            product = rows.T @ rows
            self.sums[group] = self.sums[group].add_(product) if group in self.sums else product.double()
            self.seconds += time.monotonic() - begun

        return watch(block, by_name, add)
