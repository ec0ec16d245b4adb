"""Calibration and test data of a recipe, checked before any long work starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankship_pipeline.checkpoint import load_function
from rankship_pipeline.errors import InputError
from rankship_pipeline.recipe import Recipe

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Data:
    """Tensors with samples first: `calibration` per model (unlabelled), `test_inputs` and `test_labels` (samples,)."""

    calibration: dict[str, Inputs]
    test_inputs: Inputs
    test_labels: Tensor

    def pool_calibration(self) -> Inputs:
        """All models' calibration samples, interleaved so that any prefix holds every model's share."""
        pools = list(self.calibration.values())
        joined = tuple(torch.cat(parts) for parts in zip(*pools, strict=True))
        positions = torch.cat([torch.linspace(0, 1, len(pool[0])) for pool in pools])
        order = positions.argsort(stable=True)
        return tuple(tensor[order] for tensor in joined)


def load_data(recipe: Recipe, folder: Path) -> Data:
    """Call the recipe's loader and check what it returns.

    The loader takes nothing and returns a mapping with `calibration` (model name → tensor or tuple of tensors),
    `test_inputs` (tensor or tuple) and `test_labels` (integers).
    """
    where = f"data loader {recipe.data.loader!r}"
    found = load_function(recipe.data.loader, folder)()
    if not isinstance(found, Mapping) or not {"calibration", "test_inputs", "test_labels"} <= found.keys():
        raise InputError(f"{where} must return calibration, test_inputs and test_labels", hint="see README, Recipes")
    names = {source.name for source in recipe.models}
    given = set(found["calibration"]) if isinstance(found["calibration"], Mapping) else set()
    if given != names:
        raise InputError(
            f"{where} gives calibration data for {sorted(given)}, the recipe's models are {sorted(names)}",
            hint="return a mapping with one entry per model",
        )
    calibration = {
        source.name: _check(found["calibration"][source.name], f"{where}: calibration of {source.name!r}")
        for source in recipe.models
    }
    data = Data(
        calibration=calibration,
        test_inputs=_check(found["test_inputs"], f"{where}: test_inputs"),
        test_labels=_check_labels(found["test_labels"], where),
    )
    if len(data.test_labels) != len(data.test_inputs[0]):
        raise InputError(
            f"{where}: {len(data.test_inputs[0])} test inputs, {len(data.test_labels)} labels",
            hint="return one label per test input",
        )
    return data


def _check_labels(given: object, where: str) -> Tensor:
    labels = torch.as_tensor(given)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"{where}: test_labels are {labels.dtype} of shape {list(labels.shape)}",
            hint="return one whole number per test input: the class",
        )
    return labels.to(torch.int64)


def _check(given: Tensor | Inputs, what: str) -> Inputs:
    given = given if isinstance(given, tuple | list) else (given,)
    inputs = tuple(torch.as_tensor(tensor) for tensor in given)  # numpy arrays are welcome too
    if not inputs or any(len(tensor) == 0 for tensor in inputs):
        raise InputError(f"{what} is empty", hint="give at least one sample; some hundreds work well")
    if len({len(tensor) for tensor in inputs}) > 1:
        raise InputError(f"{what}: tensors of different length", hint="every tensor has one row per sample")
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in inputs):
        raise InputError(f"{what} holds NaN or infinity", hint="clean the data that the loader returns")
    return inputs
