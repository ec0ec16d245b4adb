"""Safetensors files read whole or by their headers, and state dicts filled into modules. Never a pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError

State = dict[str, Tensor]


class TensorHeader(NamedTuple):
    """What a safetensors header says of one tensor; `dtype` is the format's own name: F32, BF16, I64."""

    shape: tuple[int, ...]
    dtype: str


# torch's names of types, as safetensors writes them
_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip and its older bare pickle


def read_state(path: Path) -> State:
    """Load a safetensors file whole; missing, pickled, damaged or non-finite content is an InputError."""
    _refuse_unreadable(path)
    state: State = load_file(path)
    _complain_of(path, [name for name, value in state.items() if not _is_finite(value)])
    return state


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _complain_of(path: Path, broken: list[str]) -> None:
    if broken:
        raise InputError(
            f"{path} holds NaN or infinity in {len(broken)} tensors: {', '.join(broken[:5])}",
            hint="export the checkpoint again from a training state that did not diverge",
        )


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor's shape and type, from a safetensors file's header alone: no tensor is read."""
    _refuse_unreadable(path)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: TensorHeader(tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}


def describe_state(module: nn.Module) -> dict[str, TensorHeader]:
    """Every tensor's shape and type in a module, as a safetensors header would tell them."""
    tensors = module.state_dict()
    return {name: TensorHeader(tuple(one.shape), _name_type(one.dtype)) for name, one in tensors.items()}


def _name_type(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _TYPES.get(name, name.upper())


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header alone."""
    return {name: header.shape for name, header in read_header(path).items()}


def refuse_broken(path: Path) -> None:
    """InputError where a safetensors file holds NaN or infinity; one tensor is in memory at a time."""
    _refuse_unreadable(path)
    with safe_open(path, framework="pt") as file:
        _complain_of(path, [name for name in file.keys() if not _is_finite(file.get_tensor(name))])  # noqa: SIM118


def _refuse_unreadable(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}", hint="correct the path; it is relative to the recipe")
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as failure:
        with path.open("rb") as stream:  # asked only now: a whole safetensors file may begin with any byte
            start = stream.read(8)
        if start.startswith(_PICKLE_STARTS):
            raise InputError(
                f"{path} is a pickle (torch.save), which can run code when it is read",
                hint="convert it once: safetensors.torch.save_file(torch.load(PATH, weights_only=True), NEW_PATH)",
            ) from None
        raise InputError(f"{path} is not a whole safetensors file: {failure}", hint="copy or export it again") from None


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> nn.Module:
    """Fill the module with a state dict; every missing, extra or misshapen tensor is listed in one InputError."""
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
    """Every way in which two sets of named shapes differ, one line each."""
    lines = [f"{name}: missing" for name in sorted(left.keys() - right.keys())]
    lines += [f"{name}: unexpected" for name in sorted(right.keys() - left.keys())]
    lines += [
        f"{name}: shape {list(right[name])} instead of {list(left[name])}"
        for name in sorted(left.keys() & right.keys())
        if left[name] != right[name]
    ]
    return lines


def copy_state(model: nn.Module) -> State:
    """A model's tensors, each with storage of its own: safetensors refuses tied weights."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
