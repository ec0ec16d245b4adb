"""Reads safetensors files or their headers, and loads state dicts into modules. Never reads a pickle."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.foreign_files import name_foreign
from rankship_pipeline.models.pickled import PICKLE_STARTS, describe_pickle

State = dict[str, Tensor]


class TensorHeader(NamedTuple):
    """One tensor's entry in a safetensors header; `dtype` is the format's own name: F32, BF16, I64."""

    shape: tuple[int, ...]
    dtype: str


AGAIN = "fetch or copy the file again, or save the model again (safetensors)"
_LENGTH_BYTES = 8  # of the header's length, little-endian, at the beginning of a file
# torch's names of types → safetensors'
_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}


def open_tensors(path: Path, wanted: str = "") -> Any:  # noqa: ANN401 - safetensors has no types
    """Open a safetensors file as a context; InputError if it is missing, pickled or damaged.

    The error also names what was `wanted` from the file.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as failure:
        reason, hint = _find_damage(path, failure)
        raise InputError((f"{wanted} cannot be read: " if wanted else "") + f"{path} {reason}", hint=hint) from None


def _find_damage(path: Path, failure: Exception) -> tuple[str, str]:
    """The damage of a file that does not open, and a hint."""
    if not path.is_file():
        return "is missing", f"correct the path (a recipe's are relative to it), or {AGAIN}"
    foreign = name_foreign(path)
    if foreign is not None:
        return foreign
    with path.open("rb") as stream:
        length, brace = stream.read(_LENGTH_BYTES), stream.read(1)
    if length.startswith(PICKLE_STARTS) and brace != b"{":  # every header begins with a brace
        return describe_pickle(path)
    return f"is not a whole safetensors file ({failure})", AGAIN


def read_state(path: Path) -> State:
    """Load a whole safetensors file; InputError if it is missing, pickled, damaged or not finite."""
    with open_tensors(path) as file:
        state: State = file.get_tensors()
    refuse_infinite(path, [name for name, value in state.items() if not is_finite(value)])
    return state


def refuse_broken(path: Path) -> None:
    """Raise InputError if a safetensors file has NaN or infinity; one tensor is in memory at a time."""
    with open_tensors(path) as file:
        refuse_infinite(path, [name for name in file.keys() if not is_finite(file.get_tensor(name))])  # noqa: SIM118


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    return not value.is_floating_point() or bool(value.isfinite().all())


def refuse_infinite(path: Path, broken: list[str]) -> None:
    """Raise InputError if the list of a file's tensors with NaN or infinity is not empty."""
    if not broken:
        return
    half = [name for name in broken if read_header(path)[name].dtype == "F16"]
    hint = "export the checkpoint again from a training state that did not diverge"
    if half:  # infinity is what a large number becomes when it is saved as float16
        hint = f"{half[0]} is float16: what is above 65504 overflowed; save the model as bfloat16 or float32"
    raise InputError(f"{path} holds NaN or infinity in {len(broken)} tensors: {', '.join(broken[:5])}", hint=hint)


def locate_tensors(path: Path, wanted: str = "") -> dict[str, tuple[TensorHeader, int]]:
    """Every tensor's header entry and first byte in a safetensors file, in the order stored.

    No tensor is read, and the file is not mapped into memory afterwards. Errors are those of `open_tensors`.
    """
    with open_tensors(path, wanted), path.open("rb") as stream:  # the library has checked the whole header
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    start = _LENGTH_BYTES + length
    found = {
        name: (TensorHeader(tuple(entry["shape"]), entry["dtype"]), start + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1][1]))


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor's shape and type, in the order stored; no tensor is read."""
    return {name: header for name, (header, _) in locate_tensors(path).items()}


def describe_state(module: nn.Module) -> dict[str, TensorHeader]:
    """Every tensor's shape and type in a module, in the form of a safetensors header."""
    return {name: describe_tensor(tensor) for name, tensor in module.state_dict().items()}


def describe_tensor(tensor: Tensor) -> TensorHeader:
    """A tensor's shape and type in the form of a safetensors header."""
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorHeader(tuple(tensor.shape), _TYPES.get(name, name.upper()))


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over types, shapes and values."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        # by bytes, as numpy has no bfloat16
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> nn.Module:
    """Load a state dict into the module; one InputError lists every tensor that does not fit."""
    check_fits(model, {name: tuple(value.shape) for name, value in state.items()}, where=where)
    model.load_state_dict(dict(state))
    return model.eval()


def check_fits(model: nn.Module, found: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raise one InputError listing every tensor that is missing, unexpected or of another shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    complaints = list_differences(expected, found)
    if complaints:
        raise InputError(
            f"{where} does not fit its factory's model:\n  " + "\n  ".join(complaints),
            hint="point `factory` at the architecture that the checkpoint was saved from",
        )


def list_differences(left: Mapping[str, tuple[int, ...]], right: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every difference between two sets of named shapes, one line each."""
    lines = [f"{name}: missing" for name in sorted(left.keys() - right.keys())]
    lines += [f"{name}: unexpected" for name in sorted(right.keys() - left.keys())]
    lines += [
        f"{name}: shape {list(right[name])} instead of {list(left[name])}"
        for name in sorted(left.keys() & right.keys())
        if left[name] != right[name]
    ]
    return lines


def copy_state(model: nn.Module) -> State:
    """A model's tensors, each with its own storage, because safetensors refuses tied weights."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
