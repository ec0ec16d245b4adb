"""Maps the class names in data to the indices of a model's outputs."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError

_NUMBERED = re.compile(r"(?:LABEL_)?(\d+)")  # "3", and transformers' "LABEL_3" for a class without a name
_SHOWN = 8


def number_classes(found: Sequence[str], names: Sequence[str], outputs: int | None, *, where: str) -> Tensor:
    """The class index of every sample (samples,), int64.

    `found` is the name of each sample's class, `names` are the model's own in the order of its `outputs` (empty: it
    has none; None outputs: not known). Without `names`, numbers are used as indices, and other names are numbered in
    sorted order, as torchvision does with folders.
    """
    distinct = sorted(set(found))
    numbers = _match(distinct, names) if names else _count(distinct, outputs, where)
    unknown = [name for name in distinct if name not in numbers]
    if unknown:
        raise InputError(
            f"{where}: the model has no class {_list(unknown)}; it has {_list(names)}",
            hint="name the classes as the model does; or write its `labels` in [[models]], in the order of its outputs",
        )
    return torch.tensor([numbers[name] for name in found], dtype=torch.int64)


def _match(distinct: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Match by name, ignoring case and separators; else by the first of a class's several names; else by index."""
    exact = {name: index for index, name in enumerate(names)}
    settled = {_settle(name): index for index, name in enumerate(names)}
    first = {_settle(name.split(",")[0]): index for index, name in enumerate(names)}
    numbers: dict[str, int] = {}
    for name in distinct:
        index = exact.get(name, settled.get(_settle(name), first.get(_settle(name))))
        numbered = _NUMBERED.fullmatch(name)
        if index is None and numbered is not None and int(numbered[1]) < len(names):
            index = int(numbered[1])
        if index is not None:
            numbers[name] = index
    return numbers


def _settle(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())


def _count(distinct: Sequence[str], outputs: int | None, where: str) -> dict[str, int]:
    numbered = [_NUMBERED.fullmatch(name) for name in distinct]
    if all(numbered):
        numbers = {name: int(match[1]) for name, match in zip(distinct, numbered, strict=True) if match}
        if outputs is not None and max(numbers.values()) >= outputs:
            raise InputError(
                f"{where}: a class is called {max(numbers, key=lambda name: numbers[name])!r}, the model's outputs are"
                f" 0 to {outputs - 1}",
                hint="number the classes from 0, or write the model's `labels` in [[models]]",
            )
        return numbers
    if outputs is not None and len(distinct) != outputs:
        raise InputError(
            f"{where}: {len(distinct)} classes ({_list(distinct)}), the model has {outputs} outputs and no class names",
            hint="write the model's `labels` in [[models]], in the order of its outputs",
        )
    return {name: index for index, name in enumerate(distinct)}


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 40 else name[:39] + "…") for name in names[:_SHOWN])  # noqa: PLR2004
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
