"""Calibration and test data as Python users hold them, brought into the tensors that the stages take."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankship_pipeline.foundation.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    Inputs = tuple[Tensor, ...]
    # one tensor; a tuple of tensors, or names and tensors; a DataLoader or a list of such batches
    Calibration = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | Iterable[Any]

MOST_SAMPLES = 1024  # that are taken of a DataLoader or a list of batches


def gather_inputs(calibration: "Calibration", model: "nn.Module", what: str) -> "tuple[Inputs, tuple[str, ...]]":
    """The inputs of `model`, samples first, on the CPU; and their names where they were given by name.

    A tensor is the one input; a tuple holds several, in the order of `forward`; a mapping names them. Anything else is
    gone through as batches of these kinds, up to MOST_SAMPLES samples, and what a batch holds beyond what `forward`
    takes (the labels of a DataLoader) is left out.
    """
    if calibration is None:
        raise InputError(f"no {what}", hint="give some hundred inputs as the model sees them, without labels")
    if _is_batch(calibration):
        return _split(calibration, what)
    if isinstance(calibration, str | bytes) or not isinstance(calibration, Iterable):
        raise InputError(
            f"{what} is a {type(calibration).__name__}", hint="give a tensor, a tuple of tensors or a DataLoader"
        )
    return _join(calibration, _count_inputs(model), what)


def _is_batch(given: object) -> bool:
    import numpy as np
    import torch

    arrays = (torch.Tensor, np.ndarray)
    if isinstance(given, Mapping):
        return True
    return isinstance(given, arrays) or (
        isinstance(given, tuple) and bool(given) and all(isinstance(one, arrays) for one in given)
    )


def _split(batch: Any, what: str) -> "tuple[Inputs, tuple[str, ...]]":  # noqa: ANN401 - what users hold
    """One batch's tensors, and their names if it has any."""
    import torch

    names = tuple(map(str, batch)) if isinstance(batch, Mapping) else ()
    parts = list(batch.values()) if names else list(batch) if isinstance(batch, tuple | list) else [batch]
    try:
        tensors = tuple(torch.as_tensor(one).detach().cpu() for one in parts)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise InputError(
            f"{what} holds {', '.join(sorted({type(one).__name__ for one in parts}))}: {failure}",
            hint="give tensors, as the model's forward takes them",
        ) from None
    if not tensors or any(tensor.ndim == 0 or len(tensor) == 0 for tensor in tensors):
        raise InputError(f"{what} is empty", hint="give at least one sample; some hundreds work well")
    return tensors, names


def _join(batches: Iterable[Any], most: int | None, what: str) -> "tuple[Inputs, tuple[str, ...]]":
    """Batches one after another."""
    import torch

    found: list[Inputs] = []
    names: tuple[str, ...] = ()
    count = 0
    for batch in batches:
        tensors, names = _split(batch, what)
        found.append(tensors if names else tensors[:most])
        count += len(tensors[0])
        if count >= MOST_SAMPLES:
            break
    if not found:
        raise InputError(f"{what} is empty", hint="give at least one batch; some hundred samples work well")
    shapes = sorted({str([list(tensor.shape[1:]) for tensor in tensors]) for tensors in found})
    if len(shapes) > 1:
        raise InputError(
            f"{what}: samples of different shapes, {' and '.join(shapes[:2])}",
            hint="pad or resize all batches alike",
        )
    return tuple(torch.cat(parts)[:MOST_SAMPLES] for parts in zip(*found, strict=True)), names


def _count_inputs(model: "nn.Module") -> int | None:
    """How many tensors `forward` takes by position, None for any number."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(kind in {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD} for kind in kinds)


def name_models(models: "Mapping[str, nn.Module] | Sequence[nn.Module]", given: object) -> "dict[str, nn.Module]":
    """The models by their names: their own, those of the calibration data in the same order, or "1", "2", …"""
    if isinstance(models, Mapping):
        return dict(models)
    names = list(map(str, given)) if isinstance(given, Mapping) else [str(one + 1) for one in range(len(models))]
    if len(names) != len(models):
        raise InputError(
            f"{len(models)} models, calibration for {', '.join(names)}", hint="give calibration data for every model"
        )
    return dict(zip(names, models, strict=True))
