"""Models from a factory beside the recipe: their functions, files and weights."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.recipe_imports import import_beside, list_imported
from rankship_pipeline.models.settle import settle
from rankship_pipeline.models.sharded import list_weight_files
from rankship_pipeline.recipe.choices import Source


class _Fresh(SourceFileLoader):
    """Compiles the file at every import; Python's cache takes a file of the same size and second for the same file."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the source as it stands."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def load_function(reference: str, folder: Path) -> Callable[..., Any]:
    """Import `function` from "file.py:function", a file beside the recipe."""
    file, _, name = reference.partition(":")
    path = folder / file
    if not path.is_file() or not name:
        raise InputError(f"{reference!r}: no file {path}", hint='write "file.py:function", a file beside the recipe')
    name_of_module = f"rankship_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name_of_module, path, loader=_Fresh(name_of_module, str(path)))
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file", hint='write "file.py:function"')
    module = importlib.util.module_from_spec(spec)
    try:
        with import_beside(folder):
            sys.modules[spec.name] = module  # dataclasses with postponed annotations look themselves up there
            spec.loader.exec_module(module)
    except ImportError as failure:
        raise InputError(
            f"{path} cannot be imported: {failure}", hint="install the packages that it imports"
        ) from failure
    except SyntaxError as failure:
        raise InputError(f"{path} is not valid Python: {failure}", hint="correct the file") from failure
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise InputError(f"{path} has no function {name!r}", hint="correct the name after the colon")

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as the user's function takes and gives
        with import_beside(folder):  # what it imports itself
            return function(*arguments, **named)

    return call


def make_module(source: Source, folder: Path) -> nn.Module:
    """Call a recipe's factory; returns the untrained module in evaluation mode."""
    model = load_function(str(source.factory), folder)()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source.factory} returned a {type(model).__name__}", hint="return a torch.nn.Module from the factory"
        )
    settle(model)
    return widen(model).eval()


def widen(model: nn.Module) -> nn.Module:
    """The module with its half-precision tensors as float32, in which everything is computed; changed in place."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in {torch.float16, torch.bfloat16}:
            tensor.data = tensor.data.float()
    return model


def list_factory_files(source: Source, folder: Path) -> list[Path]:
    """The files that define a factory's model: its code, the code that it imports from beside it, and weights."""
    references = [str(reference).partition(":")[0] for reference in (source.factory, source.train) if reference]
    files = [folder / name for name in dict.fromkeys(references)]
    files += list_imported(files, folder)
    weights = None if source.weights is None else find_weights(source, folder)
    for path in files if weights is None or weights.is_dir() else [*files, weights]:
        if not path.is_file():
            raise InputError(f"model {source.name!r}: no file {path}", hint="correct the path, relative to the recipe")
    return files if weights is None else [*files, *list_weight_files(weights)]


def find_weights(source: Source, folder: Path) -> Path:
    """The path of a model's weights, relative to the recipe or absolute; `$NAME` is an environment variable."""
    path = os.path.expandvars(str(source.weights))
    if "$" in path:
        raise InputError(
            f"model {source.name!r}: {source.weights} names an environment variable that is not set",
            hint="set it to the folder that holds the weights, or give the path itself",
        )
    return folder / path
