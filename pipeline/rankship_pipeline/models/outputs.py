"""What a model returns, as named tensors: a tensor, or tuples, lists, mappings and dataclasses of them, also nested."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

Outputs = dict[str, Tensor]
ONLY = "output"  # the name of a model's output that is one bare tensor


def flatten(given: object) -> Outputs:
    """Every tensor with samples first by its name, in the model's order: `x`, `0` of a tuple, `x.0` nested.

    What is no tensor (None, a cache of keys and values, a number), or has no dimension, is left out.
    """
    return {name or ONLY: one for name, one in _walk(given, "") if isinstance(one, Tensor) and one.ndim > 0}


def list_dropped(given: object) -> list[str]:
    """The names of what `flatten` leaves out, with its type; None is nothing."""
    return [
        f"{name or ONLY} ({'a scalar' if isinstance(one, Tensor) else type(one).__name__})"
        for name, one in _walk(given, "")
        if not isinstance(one, Tensor) or one.ndim == 0
    ]


def call(model: nn.Module, batch: Sequence[Tensor]) -> Outputs:
    """The named outputs of a model for one batch."""
    return flatten(model(*batch))


def _walk(given: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield the leaves of what a model returned under their names, None left out."""
    if given is None:
        return
    parts = _list_parts(given)
    if parts is None:
        yield name, given
        return
    for key, value in parts:
        yield from _walk(value, f"{name}.{key}" if name else key)


def _list_parts(given: object) -> list[tuple[str, object]] | None:
    """The named parts of a container; None for anything else."""
    if isinstance(given, Tensor):
        return None
    if isinstance(given, Mapping):  # also transformers' outputs
        return [(str(key), value) for key, value in given.items()]
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return list(zip(given._fields, given, strict=True))
    if isinstance(given, tuple | list):
        return [(str(place), value) for place, value in enumerate(given)]
    if is_dataclass(given) and not isinstance(given, type):
        return [(field.name, getattr(given, field.name)) for field in fields(given)]
    return None


def join_batches(batches: Sequence[Outputs]) -> Outputs:
    """The outputs of batches, one after another."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
