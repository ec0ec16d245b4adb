"""Calibration and test data as Python users hold them, brought into the tensors that the stages take."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankship.wrapped import Wrapping, is_transformers, list_inputs, order_inputs, pick_inputs
from rankship_pipeline.foundation.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    Inputs = tuple[Tensor, ...]
    # one tensor; a tuple of tensors, or names and tensors; a DataLoader or a list of such batches
    Calibration = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | Iterable[Any]
    Tests = tuple[Calibration, Tensor] | Iterable[Any]  # inputs and labels; a DataLoader or list of batches of both

MOST_SAMPLES = 1024  # that are taken of a DataLoader or a list of batches for calibration
_LABELS = "labels"  # what transformers calls them in a batch


def name_models(models: "Mapping[str, nn.Module] | Sequence[nn.Module]", given: object) -> "dict[str, nn.Module]":
    """The models by their names: their own, those of the calibration data in the same order, or their numbers."""
    if isinstance(models, Mapping):
        return dict(models)
    names = list(map(str, given)) if isinstance(given, Mapping) else [str(one + 1) for one in range(len(models))]
    if len(names) != len(models):
        raise InputError(
            f"{len(models)} models, calibration for {len(names)}: {', '.join(names)}",
            hint="give calibration data for every model, and for no other",
        )
    return dict(zip(names, models, strict=True))


def gather_calibration(
    models: "Mapping[str, nn.Module]",
    given: object,
    what: str,
    wanted: tuple[str, ...] = (),
    most: int | None = MOST_SAMPLES,
) -> "tuple[dict[str, Inputs], tuple[Wrapping, ...]]":
    """Every model's inputs, by the models' names or in their order, and how each model takes them.

    The inputs of transformers models come in one order for all: that of `wanted`, else of the first model's. At `most`
    so many samples are taken of a DataLoader; None: all.
    """
    if given is None:
        raise InputError(
            f"no {what} data are given", hint="give some hundred inputs as the model sees them, without labels"
        )
    if isinstance(given, list | tuple):
        given = dict(zip(models, given, strict=False)) if len(given) == len(models) else given
    if not isinstance(given, Mapping) or set(given) != set(models):
        found = sorted(map(str, given)) if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise InputError(
            f"{what} is given for {found}, the models are {sorted(models)}",
            hint="give a mapping with one entry per model",
        )
    inputs: dict[str, Inputs] = {}
    wrappings = []
    for name, model in models.items():
        of_one = f"{what} of {name!r}"
        tensors, names = gather_inputs(given[name], model, of_one, most)
        if is_transformers(model):
            wanted = wanted or _name_inputs(model, tensors, names)
        wrappings.append(Wrapping(name, model, wanted if is_transformers(model) else ()))
        inputs[name] = _order(wrappings[-1], tensors, names, of_one)
    return inputs, tuple(wrappings)


def gather_inputs(
    given: object, model: "nn.Module", what: str, most: int | None = MOST_SAMPLES
) -> "tuple[Inputs, tuple[str, ...]]":
    """The inputs of one model, samples first, on the CPU; and their names where they were given by name.

    A tensor is the one input; a tuple holds several, in the order of `forward`; a mapping names them. Anything else is
    gone through as batches of these kinds, up to `most` samples, and what a batch holds beyond what `forward`
    must have (the labels of a DataLoader) is left out: batches that give optional inputs name them.
    """
    if _is_batch(given):
        return _split(given, what)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise InputError(
            f"{what} is a {type(given).__name__}", hint="give a tensor, a tuple of tensors or a DataLoader"
        )
    batches = [_split(batch, what) for batch in _take(given, most)]
    parts = [(tensors if names else _leave_labels(tensors, model, what), names) for tensors, names in batches]
    return _join(parts, what, most)


def _leave_labels(tensors: "Inputs", model: "nn.Module", what: str) -> "Inputs":
    """The tensors of one batch that `forward` must have; all, where it takes any number."""
    taken, needed = list_inputs(model), list_inputs(model, needed=True)
    if len(tensors) == 1 or not taken:
        return tensors
    if is_transformers(model) or not needed:
        raise InputError(
            f"a batch of {what} holds {len(tensors)} tensors without names, and {type(model).__name__} takes several"
            " that may be left out: which are inputs, and which labels, cannot be seen",
            hint="give batches by name: {'input_ids': …, 'attention_mask': …}",
        )
    return tensors[: len(needed)]


def gather_tests(given: object, wrappings: Sequence[Wrapping]) -> dict[str, object]:
    """What a loader would return of tests: of all models, or of each one by its name; nothing for None.

    Tests are inputs, as calibration is given, and labels; or a DataLoader, or list of batches, with the labels last.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        known = {one.name: one for one in wrappings}
        if not set(given) <= set(known):
            raise InputError(f"test is given for {sorted(given)}, the models are {sorted(known)}", hint="name those")
        return {"tests": {name: _gather_test(one, known[name], f"test of {name!r}") for name, one in given.items()}}
    inputs, labels = _gather_test(given, wrappings[0], "test")
    return {"test_inputs": inputs, "test_labels": labels}


def _gather_test(given: object, wrapping: Wrapping, what: str) -> "tuple[Inputs, Tensor]":
    import torch

    if isinstance(given, tuple) and len(given) == 2:  # noqa: PLR2004 - inputs and labels
        tensors, names = gather_inputs(given[0], wrapping.given, f"{what} inputs")
        labels = torch.as_tensor(given[1]).cpu()
    elif isinstance(given, Iterable) and not _is_batch(given):
        pairs = [_part(batch, what) for batch in given]
        tensors, names = _join([pair[0] for pair in pairs], what, None)
        labels = torch.cat([pair[1] for pair in pairs])
    else:
        raise InputError(f"{what} holds no labels", hint="give (inputs, labels), or a DataLoader of both")
    return _order(wrapping, tensors, names, what), labels


def _part(batch: Any, what: str) -> "tuple[tuple[Inputs, tuple[str, ...]], Tensor]":  # noqa: ANN401 - what users hold
    """One batch's inputs with their names, and its labels."""
    if isinstance(batch, Mapping) and _LABELS in batch:
        (labels,), _ = _split(batch[_LABELS], what)
        return _split(batch, what), labels
    if not isinstance(batch, list | tuple) or len(batch) < 2:  # noqa: PLR2004 - inputs and labels
        raise InputError(f"a batch of {what} holds no labels", hint="give (inputs, labels), or a DataLoader of both")
    *tensors, labels = _split(tuple(batch), what)[0]
    return (tuple(tensors), ()), labels


def _name_inputs(model: "nn.Module", tensors: "Inputs", names: tuple[str, ...]) -> tuple[str, ...]:
    """The names by which tensors reach a transformers model: as given, or the first that its `forward` takes."""
    return names or tuple(list_inputs(model)[: len(tensors)])


def _order(wrapping: Wrapping, tensors: "Inputs", names: tuple[str, ...], what: str) -> "Inputs":
    """Tensors in the order in which the model takes them: by its wrapping's names, else by its `forward`."""
    if wrapping.inputs:
        return pick_inputs(tensors, _name_inputs(wrapping.given, tensors, names), wrapping.inputs, what)
    return order_inputs(wrapping.given, tensors, names, what) if names else tensors


def _is_batch(given: object) -> bool:
    import numpy as np
    import torch

    arrays = (torch.Tensor, np.ndarray)
    if isinstance(given, tuple):
        return bool(given) and all(isinstance(one, arrays) for one in given)
    return isinstance(given, (*arrays, Mapping))


def _split(batch: Any, what: str) -> "tuple[Inputs, tuple[str, ...]]":  # noqa: ANN401 - what users hold
    """One batch's tensors, and their names if it has any; labels among them are left out."""
    import torch

    named = {str(key): one for key, one in batch.items() if key != _LABELS} if isinstance(batch, Mapping) else {}
    parts = list(named.values()) if named else list(batch) if isinstance(batch, tuple | list) else [batch]
    try:
        tensors = tuple(_settle(torch.as_tensor(one)) for one in parts)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise InputError(
            f"{what} holds {', '.join(sorted({type(one).__name__ for one in parts}))}: {failure}",
            hint="give tensors, as the model's forward takes them",
        ) from None
    if not tensors or any(tensor.ndim == 0 or len(tensor) == 0 for tensor in tensors):
        raise InputError(f"{what} is empty", hint="give at least one sample; some hundreds work well")
    return tensors, tuple(named)


def _settle(tensor: "Tensor") -> "Tensor":
    """The tensor on the CPU, float32 if it is of any floating type, as the stages' models are."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _take(batches: Iterable[Any], samples: int | None) -> Iterable[Any]:
    """The first batches, until they hold this many samples; None: all."""
    count = 0
    for batch in batches:
        yield batch
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
        count += len(first[0]) if isinstance(first, list | tuple) else len(first)
        if samples is not None and count >= samples:
            return


def _join(
    batches: "Sequence[tuple[Inputs, tuple[str, ...]]]", what: str, most: int | None
) -> "tuple[Inputs, tuple[str, ...]]":
    """Batches one after another, up to so many samples."""
    import torch

    if not batches:
        raise InputError(f"{what} is empty", hint="give at least one batch; some hundred samples work well")
    names = batches[0][1]
    batches = [(pick_inputs(tensors, own, names, what), own) for tensors, own in batches]
    shapes = sorted({str([list(tensor.shape[1:]) for tensor in tensors]) for tensors, _ in batches})
    if len(shapes) > 1:
        raise InputError(
            f"{what}: samples of different shapes, {' and '.join(shapes[:2])}", hint="pad or resize all batches alike"
        )
    pools = zip(*(tensors for tensors, _ in batches), strict=True)
    return tuple(torch.cat(parts)[:most] for parts in pools), names
