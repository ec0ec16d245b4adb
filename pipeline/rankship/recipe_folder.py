"""A session's recipe as a folder that builds without it: recipe.toml, weights and data as safetensors, what reads them.

recipe.toml         the recipe
costs.json          the table of costs, where the budget is met by one
data.py             a loader that reads data.safetensors
data.safetensors    calibration inputs of every model, tests where there are some
<model>.safetensors the tensors of a plain torch model, which a factory makes: a class or function without arguments
<model>/            a transformers model as its library saves it
"""

import ast
import copy
import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rankship.recipe import Recipe
from rankship.wrapped import Wrapping
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import publish_file, write_atomic
from rankship_pipeline.foundation.formats import FORMATS
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.model_config import name_task
from rankship_pipeline.models.source import load_function
from rankship_pipeline.models.weights import check_fits, copy_state
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import DataChoice, QualityChoice, Source, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankship_pipeline.models.data import Data, Held

_COSTS = "costs.json"
_INSTALLED = {"site-packages", "dist-packages"}  # folders of packages that any session can import
_LOADER = '''\
"""The data that this recipe was first compressed with, as tensors: data.safetensors beside this file."""

import json
from pathlib import Path

from safetensors import safe_open


def load():
    """Calibration inputs of every model, and tests where there were some."""
    with safe_open(Path(__file__).with_name("data.safetensors"), framework="pt") as file:
        names = json.loads(file.metadata()["names"])
        return _fill(names, file.get_tensor)


def _fill(names, read):
    if isinstance(names, dict):
        return {key: _fill(value, read) for key, value in names.items()}
    if isinstance(names, list):
        return tuple(_fill(one, read) for one in names)
    return None if names is None else read(names)
'''
_FACTORY = '''\
"""Makes the untrained model of this recipe."""

from {module} import {name}


def make():
    """The architecture, before its weights are loaded."""
    return {name}()
'''


def write_recipe_folder(
    recipe: Recipe, beside: Path, held: "Held", wrappings: Sequence[Wrapping], folder: Path, factory: object
) -> Recipe:
    """Write a folder whose recipe builds what this session's does; returns that recipe.

    The session's recipe names a table of costs relative to `beside`.
    """
    reference = None if isinstance(wrappings[0].given, _library_models()) else _write_factory(held, folder, factory)
    folder.mkdir(parents=True, exist_ok=True)
    names = _name_files(held.models)
    sources = {name: _write_model(name, names[name], held, folder, reference) for name in held.models}
    _write_data(held.data, folder)
    written = replace(
        recipe,
        models=tuple(sources[one.name] for one in recipe.models),
        data=DataChoice(loader="data.py:load"),
        budget=_copy_costs(recipe.budget, beside, folder),
        merge=recipe.merge
        if recipe.merge.base is None
        else replace(recipe.merge, base=sources[recipe.merge.base.name]),
        quality=_copy_function(recipe.quality, beside, folder),
        export=recipe.export if recipe.export.formats else replace(recipe.export, formats=FORMATS),
    )
    written.write(folder / "recipe.toml")
    return written


def _copy_costs(budget: Budget, beside: Path, folder: Path) -> Budget:
    """The budget with its table of costs in the folder."""
    if budget.costs is None:
        return budget
    table = beside / budget.costs
    if table.resolve() != (folder / _COSTS).resolve():
        shutil.copyfile(table, folder / _COSTS)
    return replace(budget, costs=_COSTS)


def _copy_function(choice: QualityChoice, beside: Path, folder: Path) -> QualityChoice:
    """How answers are judged, with the file of a score of one's own in the folder."""
    if choice.function is None:
        return choice
    file, _, name = choice.function.partition(":")
    _copy(beside / file, folder)
    return replace(choice, function=f"{Path(file).name}:{name}")


def _library_models() -> tuple[type, ...]:
    library: Any = sys.modules.get("transformers")
    return () if library is None else (library.PreTrainedModel,)


def _name_files(names: Mapping[str, object]) -> dict[str, str]:
    """A file name for every model, no two alike."""
    found = {name: re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model" for name in names}
    taken = {"data", "recipe"}
    for name, file in found.items():
        while file in taken:
            file += "-"  # noqa: PLW2901 - until it is free
        taken.add(file)
        found[name] = file
    return found


def _write_model(name: str, file: str, held: "Held", folder: Path, factory: str | None) -> Source:
    """A model's files, and how a recipe names them."""
    from safetensors.torch import save_file

    module = held.models[name]
    if isinstance(module, ByPosition):
        own = copy.deepcopy(module.model)
        own.save_pretrained(folder / file)  # type: ignore[operator]  # transformers has no types
        return Source(name=name, huggingface=file, task=_find_task(own), inputs=module.inputs)
    with publish_file(folder / f"{file}.safetensors") as path:
        save_file(copy_state(module), path)
    return Source(name=name, factory=factory, weights=f"{file}.safetensors")


def _find_task(model: "nn.Module") -> Task:
    task = name_task(type(model).__name__)
    if task is not None:
        return task
    raise InputError(
        f"a recipe has no task for a {type(model).__name__}", hint=f"tasks are {', '.join(get_args(Task))}"
    )


def _write_data(data: "Data", folder: Path) -> None:
    """Every tensor under a name of its own, and the loader that puts them together again."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def name(value: Any, key: str) -> Any:  # noqa: ANN401 - tensors inside tuples and mappings
        if isinstance(value, Mapping):
            return {one: name(inner, f"{key}/{one}") for one, inner in value.items()}
        if isinstance(value, tuple):
            return [name(inner, f"{key}.{place}") for place, inner in enumerate(value)]
        if value is None:
            return None
        tensors[key] = value.clone()
        return key

    parts: dict[str, Any] = {
        "calibration": data.calibration,
        "test_inputs": data.test_inputs,
        "test_labels": data.test_labels,
    }
    parts |= {key: value for key, value in (("unlabelled", data.unlabelled), ("tests", data.tests)) if value}
    names = {key: name(value, key) for key, value in parts.items()}
    with publish_file(folder / "data.safetensors") as path:
        save_file(tensors, path, metadata={"names": json.dumps(names)})
    write_atomic(folder / "data.py", _LOADER.encode())


def _write_factory(held: "Held", folder: Path, given: object) -> str:
    """What makes the untrained architecture, as "file.py:function" beside the recipe; proven to fit the weights."""
    module = next(iter(held.models.values()))
    if isinstance(given, str) and ".py:" in given:
        file, _, function = given.partition(":")
        reference = f"{Path(file).name}:{function}"
        if not Path(file).is_file():
            raise InputError(f"no file {file}", hint='give factory="file.py:function"')
        _copy(Path(file), folder)
    else:
        reference = _write_import(_find_maker(given, module), folder)
    made = load_function(reference, folder)()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_fits(made, expected, where=f"the model, made by {reference},")
    return reference


def _find_maker(given: object, module: "nn.Module") -> Callable[[], Any]:
    """The class or function that makes the architecture: as given, else the model's own class."""
    maker: Any = type(module) if given is None else given
    asked = 'give factory="file.py:function", or a function or class that can be imported'
    if not callable(maker) or not hasattr(maker, "__qualname__"):
        raise InputError(f"factory is a {type(given).__name__}", hint=asked)
    title = f"{maker.__module__}.{maker.__qualname__}"
    found: Any = None
    with suppress(ImportError):
        found = getattr(importlib.import_module(maker.__module__), maker.__qualname__, None)
    if maker.__module__ == "__main__" or found is not maker:
        raise InputError(f"{title} is typed into this session: no recipe can import it", hint=asked)
    try:
        maker()
    except TypeError as failure:
        raise InputError(f"{title} does not make the model without arguments: {failure}", hint=asked) from None
    return found  # type: ignore[no-any-return]  # known to be callable


def _write_import(maker: Callable[[], Any], folder: Path) -> str:
    """A copy of the file that holds it, where that is a single module of the user's; else a file that imports it."""
    module, name = maker.__module__, maker.__qualname__
    file = Path(inspect.getfile(maker))
    if "." not in module and not _INSTALLED & set(file.parts):
        _copy(file, folder)
        return f"{file.name}:{name}"
    _write_code(folder / "model.py", _FACTORY.format(module=module, name=name).encode())
    return "model.py:make"


def _copy(file: Path, folder: Path) -> None:
    """Copy the user's file into the folder; InputError where it needs others of the user's, or would replace one."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.name in {"data.py", "recipe.toml"}:
        raise InputError(f"{file} has the name of a file of the recipe's own", hint="rename it")
    if file.resolve() == (folder / file.name).resolve():
        return
    if beside := _find_beside(file):
        raise InputError(
            f"{file} imports {', '.join(beside)} from beside it, which the recipe's folder would lack",
            hint=f"put them into one file, or copy {', '.join(beside)} into a package that is installed",
        )
    _write_code(folder / file.name, file.read_bytes())


def _find_beside(file: Path) -> list[str]:
    """The modules that lie beside a file and that it imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            found |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module.partition(".")[0]} if node.module else {one.name for one in node.names}
    beside = {path.stem for path in file.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    return sorted((found & beside) - {file.stem})


def _write_code(path: Path, content: bytes) -> None:
    """Write a file of code; InputError where another lies there."""
    if path.exists() and path.read_bytes() != content:
        raise InputError(f"{path} is there already, with other content", hint="name a new folder, or move it away")
    write_atomic(path, content)
