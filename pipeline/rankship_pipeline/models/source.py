"""Trained models in: safetensors state dicts behind a factory, or Hugging Face folders. Never a pickle."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.recipe.choices import Source

State = dict[str, Tensor]


class TensorHeader(NamedTuple):
    """What a safetensors header says of one tensor; `dtype` is the format's own name: F32, BF16, I64."""

    shape: tuple[int, ...]
    dtype: str


_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip and its older bare pickle


def load_function(reference: str, folder: Path) -> Callable[..., Any]:
    """Import `function` from "file.py:function", the file beside the recipe."""
    file, _, name = reference.partition(":")
    path = folder / file
    if not path.is_file() or not name:
        raise InputError(f"{reference!r}: no file {path}", hint='write "file.py:function", the file beside the recipe')
    spec = importlib.util.spec_from_file_location(f"rankship_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file", hint='write "file.py:function"')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses with postponed annotations look themselves up there
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # modules beside the recipe can be imported
    try:
        spec.loader.exec_module(module)
    except ImportError as failure:
        raise InputError(f"{path} cannot be imported: {failure}", hint="install what it imports") from failure
    except SyntaxError as failure:
        raise InputError(f"{path} is not valid Python: {failure}", hint="correct the file") from failure
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise InputError(f"{path} has no function {name!r}", hint="correct the name after the colon")
    return function


def make_model(source: Source, folder: Path, seed: int) -> nn.Module:
    """Build the untrained module; one seed for all sources of a recipe gives all the same initialisation."""
    torch.manual_seed(seed)
    if source.huggingface is not None:
        from rankship_pipeline.models.huggingface import make_wrapped

        return make_wrapped(source, folder)
    model = load_function(str(source.factory), folder)()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source.factory} returned a {type(model).__name__}", hint="a factory returns a torch.nn.Module"
        )
    return model.eval()


def hash_source(source: Source, folder: Path) -> str:
    """SHA-256 over every file that defines the model: code, weights, configuration."""
    state = hashlib.sha256()
    for path in _list_files(source, folder):
        state.update(f"{path.name} {hash_file(path)}\n".encode())
    return state.hexdigest()


def _list_files(source: Source, folder: Path) -> list[Path]:
    if source.adapter is not None:
        from rankship_pipeline.models.lora import list_adapter_files

        return [*_list_files(replace(source, adapter=None), folder), *list_adapter_files(folder / source.adapter)]
    if source.huggingface is not None:
        from rankship_pipeline.models.huggingface import list_files

        return list_files(source, folder)
    references = [str(reference).partition(":")[0] for reference in (source.factory, source.train) if reference]
    files = [folder / name for name in dict.fromkeys(references)]
    files += [path for path in _list_imported(folder) if path not in files]
    if source.weights is not None:
        files.append(find_weights(source, folder))
    for path in files:
        if not path.is_file():
            raise InputError(f"model {source.name!r}: no file {path}", hint="correct the path, relative to the recipe")
    return files


def _list_imported(folder: Path) -> list[Path]:
    """Files below the recipe's folder that its functions have imported so far; installed packages left out."""
    modules = [module for name, module in list(sys.modules.items()) if not name.startswith("rankship_")]
    files = {Path(file) for module in modules if (file := getattr(module, "__file__", None))}
    mine = [path for path in files if path.is_relative_to(folder) and not {"site-packages", ".venv"} & set(path.parts)]
    return sorted(path for path in mine if path.is_file())


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


def find_weights(source: Source, folder: Path) -> Path:
    """The path of a model's weights, beside the recipe or absolute; `$NAME` stands for an environment variable."""
    path = os.path.expandvars(str(source.weights))
    if "$" in path:
        raise InputError(
            f"model {source.name!r}: {source.weights} names an environment variable that is not set",
            hint="set it to the folder that holds the weights, or give the path itself",
        )
    return folder / path


def copy_state(model: nn.Module) -> State:
    """A model's tensors, each with storage of its own: safetensors refuses tied weights."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def train_or_load(source: Source, folder: Path, seed: int) -> State:
    """The model's trained state, float32 on the CPU: loaded, or trained on the spot by the recipe's function.

    An adapter is added to it.
    """
    if source.adapter is not None:
        from rankship_pipeline.models.lora import read_adapter

        adapter = read_adapter(folder / source.adapter)
        if source.huggingface is None:
            return adapter.add_to(train_or_load(replace(source, adapter=None), folder, seed))
        from rankship_pipeline.models.huggingface import PREFIX, load_wrapped_state

        supplied = {PREFIX + name for name in adapter.replaced}
        return adapter.add_to(load_wrapped_state(source, folder, supplied), PREFIX)
    model = make_model(source, folder, seed)
    if source.train is not None:
        torch.manual_seed(seed)
        load_function(source.train, folder)(model, seed)
        broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise BuildError(
                f"training {source.name!r} diverged: {broken[0]} is not finite", hint="lower its step size"
            )
        return copy_state(model)
    if source.weights is not None:
        state = read_state(find_weights(source, folder))
        return copy_state(load_into(model, state, where=os.fspath(find_weights(source, folder))))
    from rankship_pipeline.models.huggingface import load_wrapped_state

    return load_wrapped_state(source, folder)
