"""Loads and checks a recipe's calibration and test data before any long work starts."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import Answers
from rankship_pipeline.models.data_files import Mender, load_files
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.models.source import load_function
from rankship_pipeline.recipe.choices import Recipe

Inputs = tuple[Tensor, ...]
_HALVES = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """Tensors with samples first: `calibration` per model (unlabelled), `test_inputs` and `test_labels`.

    Labels are whole numbers (classes of samples, positions or pixels, where -100 does not count) or other numbers of an
    output's shape. Without labels `test_labels` is None, and quality is the distance from the sources.
    `tests` are inputs and labels of each model's own task, if the loader gives them. With a head per model, `tasks`
    names the tasks, and the last input is each sample's task number (see heads.py).
    `answers` says whether `test_labels` are the data's own labels or the model's predictions before compressing.
    """

    calibration: dict[str, Inputs]
    test_inputs: Inputs
    test_labels: Tensor | None
    unlabelled: dict[str, Inputs] = field(default_factory=dict)
    tests: dict[str, tuple[Inputs, Tensor]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    answers: Answers = "labels"

    @property
    def labels(self) -> Tensor:
        """The test labels; InputError if the data have none."""
        if self.test_labels is None:
            raise InputError("the data have no test labels", hint="give a label for every test input")
        return self.test_labels

    def list_unlabelled(self, name: str) -> Inputs:
        """Inputs of one model's task for refinement: the loader's `unlabelled`, else its calibration data."""
        return self.unlabelled.get(name, self.calibration[name])

    def pool_calibration(self) -> Inputs:
        """All models' calibration samples, interleaved so that any prefix has each model's share."""
        return _interleave(list(self.calibration.values()))

    def pool_tests(self) -> tuple[Inputs, Tensor]:
        """All models' own tests, interleaved in the same way: inputs and labels."""
        *inputs, labels = _interleave([(*inputs, labels) for inputs, labels in self.tests.values()])
        return tuple(inputs), labels

    def strip(self, inputs: Inputs) -> Inputs:
        """The inputs of a single model or an exported file: all but the task number."""
        return inputs[:-1] if self.tasks else inputs


@dataclass(frozen=True)
class Held:
    """Models and data of a Python session: modules by the names of a recipe's models, and their data."""

    models: Mapping[str, nn.Module]
    data: Data


def _interleave(pools: list[Inputs]) -> Inputs:
    joined = tuple(torch.cat(parts) for parts in zip(*pools, strict=True))
    positions = torch.cat([torch.linspace(0, 1, len(pool[0])) for pool in pools])
    order = positions.argsort(stable=True)
    return tuple(tensor[order] for tensor in joined)


def load_data(recipe: Recipe, folder: Path, sources: Mapping[str, OpenedSource], mend: Mender | None = None) -> Data:
    """Call the recipe's loader, or read the files that the recipe names (data_files.py), and check the data.

    The loader takes no argument, or the recipe's `seed`, and returns a mapping with `calibration` (model name → tensor
    or tuple of tensors), `test_inputs` (tensor or tuple) and, where there are some, `test_labels` (classes, or numbers
    of an output's shape; a tuple or mapping of start and end for spans).
    `unlabelled`, in the form of `calibration`, may hold more data for refinement; `tests` (model name → inputs, labels)
    test each model's own task. With merge.head, every model must have `tests`, which together are the test inputs.
    `mend` changes the first model as the build does, where its predictions stand for labels.
    """
    where = recipe.data.origin
    if recipe.data.loader is None:
        return make_data(load_files(recipe, folder, sources, mend), recipe, where)
    loader = load_function(recipe.data.loader, folder)
    return make_data(
        loader(seed=recipe.seed) if "seed" in inspect.signature(loader).parameters else loader(), recipe, where
    )


def make_data(found: Mapping[str, Any], recipe: Recipe, where: str) -> Data:
    """Check the data of a loader or a Python session, and convert them; `where` is their name in errors."""
    _check_keys(found, recipe, where)
    names = [source.name for source in recipe.models]
    tests = {
        name: (_check(inputs, f"{where}: tests of {name!r}"), _check_labels(labels, where))
        for name, (inputs, labels) in ((name, found["tests"][name]) for name in names if name in found.get("tests", {}))
    }
    calibration = {name: _check(found["calibration"][name], f"{where}: calibration of {name!r}") for name in names}
    _check_alike(calibration, where)
    _check_lengths({f"test inputs of {name!r}": pair for name, pair in tests.items()}, where)
    if recipe.merge.head is None:
        test_inputs = _check(found["test_inputs"], f"{where}: test_inputs")
        given = found.get("test_labels")
        test_labels = None if given is None else _check_labels(given, where)
    else:
        _check_alike(calibration | {f"tests of {name}": inputs for name, (inputs, _) in tests.items()}, where)
        test_inputs, test_labels = Data(calibration, (), torch.empty(0), tests=tests).pool_tests()
    if test_labels is not None:
        _check_lengths({"test inputs": (test_inputs, test_labels)}, where)
    return Data(
        calibration=calibration,
        test_inputs=test_inputs,
        test_labels=test_labels,
        unlabelled={
            name: _check(inputs, f"{where}: unlabelled of {name!r}")
            for name, inputs in found.get("unlabelled", {}).items()
        },
        tests=tests,
        answers=found.get("answers", "labels"),
    )


def _check_keys(found: object, recipe: Recipe, where: str) -> None:
    """Refuse data that lack a key, or name other models than the recipe's."""
    headed = recipe.merge.head is not None
    wanted = ["calibration", "tests"] if headed else ["calibration", "test_inputs"]
    if not isinstance(found, Mapping) or not set(wanted) <= found.keys():
        raise InputError(f"{where} must return {', '.join(wanted)}", hint="see README, Recipes")
    names = {source.name for source in recipe.models}
    for key in ("calibration", *(["tests"] if headed else [])):
        given = set(found[key]) if isinstance(found[key], Mapping) else set()
        if given != names:
            raise InputError(
                f"{where} gives {key} for {sorted(given)}, the recipe's models are {sorted(names)}",
                hint="return a mapping with one entry per model",
            )
    for key in ("unlabelled", "tests"):
        if not set(found.get(key, {})) <= names:
            raise InputError(
                f"{where} gives {key} for {sorted(found[key])}, the recipe's models are {sorted(names)}",
                hint="name the recipe's models",
            )


def _check_lengths(tests: Mapping[str, tuple[Inputs, Tensor]], where: str) -> None:
    for what, (inputs, labels) in tests.items():
        if len(labels) != len(inputs[0]):
            raise InputError(
                f"{where}: {len(inputs[0])} {what}, {len(labels)} labels", hint="return one label per test input"
            )


def _check_alike(inputs: Mapping[str, Inputs], where: str) -> None:
    """Check that all models' samples have the same shape, because one model takes them."""
    shapes = {name: [tuple(tensor.shape[1:]) for tensor in tensors] for name, tensors in inputs.items()}
    first, *others = shapes
    for other in others:
        if shapes[other] != shapes[first]:
            raise InputError(
                f"{where}: a sample of {other!r} has shape {shapes[other]}, one of {first!r} {shapes[first]}",
                hint="one merged model takes them all: pad or resize them to the same shape",
            )


def _check_labels(given: object, where: str) -> Tensor:
    """Labels as whole numbers (int64) or as float32; a tuple or mapping of several per sample has them last."""
    parts = list(given.values()) if isinstance(given, Mapping) else given
    if isinstance(parts, tuple | list) and parts and all(isinstance(one, Tensor) and one.ndim for one in parts):
        given = torch.stack(parts, -1) if len({one.shape for one in parts}) == 1 else given
    try:
        labels = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as failure:
        raise InputError(
            f"{where}: test_labels are a {type(given).__name__}: {failure}",
            hint="return one tensor with a row for every test input; or none",
        ) from None
    if labels.ndim == 0 or labels.is_complex():
        raise InputError(
            f"{where}: test_labels are {labels.dtype} of shape {list(labels.shape)}",
            hint="return a class, or numbers of the output's shape, for every test input; or none",
        )
    if not labels.is_floating_point():
        return labels.to(torch.int64)
    if not labels.isfinite().all():
        raise InputError(f"{where}: test_labels hold NaN or infinity", hint="leave out samples without a label")
    return labels.to(torch.float32)


def _check(given: Tensor | Inputs, what: str) -> Inputs:
    given = given if isinstance(given, tuple | list) else (given,)
    inputs = tuple(torch.as_tensor(tensor).detach().cpu() for tensor in given)  # numpy arrays are welcome too
    inputs = tuple(tensor.float() if tensor.dtype in _HALVES else tensor for tensor in inputs)  # as models are widened
    if not inputs or any(len(tensor) == 0 for tensor in inputs):
        raise InputError(f"{what} is empty", hint="give at least one sample; some hundreds work well")
    if len({len(tensor) for tensor in inputs}) > 1:
        raise InputError(f"{what}: tensors of different length", hint="every tensor has one row per sample")
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in inputs):
        raise InputError(f"{what} holds NaN or infinity", hint="clean the data that the loader returns")
    return inputs
