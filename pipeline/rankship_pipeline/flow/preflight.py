"""Everything that can be wrong with a recipe, found in seconds, before any long work starts."""

import fnmatch
import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rankship_pipeline.align.differences import check_mergeable
from rankship_pipeline.align.make_alike import Mend, mend_model
from rankship_pipeline.evaluate.accuracy import IGNORED
from rankship_pipeline.export import EXPORTERS
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.records import Factors, Landing
from rankship_pipeline.foundation.toolchain import RUNTIMES, find_version
from rankship_pipeline.models.data import Data, Inputs, load_data
from rankship_pipeline.models.heads import HEADS, Headed, join, mark_tasks
from rankship_pipeline.models.huggingface import PREFIX
from rankship_pipeline.models.layers import Layer, count_parameters, find_layers
from rankship_pipeline.models.lora import read_adapter
from rankship_pipeline.models.model_config import complete_recipe
from rankship_pipeline.models.source import find_weights, hash_source, load_function, make_model
from rankship_pipeline.models.weights import check_fits, read_shapes, refuse_broken
from rankship_pipeline.ranks.budget import check_feasible, resolve_budget
from rankship_pipeline.ranks.call_sites import Site, find_sites, hash_model
from rankship_pipeline.ranks.price import Price, price_flops, price_parameters, price_table, read_table
from rankship_pipeline.recipe.choices import Recipe, Source, choose, list_sources, rank_choice


@dataclass(frozen=True)
class Prepared:
    """A recipe that passed: its data, its untrained model and layers, and hashes of all that goes in.

    `fixed_parameters` lie outside the factorable layers. `budget` is in the unit of `price`; 0 with ARP's fixed
    threshold. Where the budget is a latency to be landed on a device, both are the dense model's until it was (see
    landed.py), and `landing` tells of that. `mends` say how each model is made like the first before merging, `notes`
    which differences were named.
    """

    recipe: Recipe
    recipe_sha256: str
    folder: Path
    data: Data
    calibration_sha256: dict[str, str]
    test_sha256: str
    tests_sha256: dict[str, str]
    unlabelled_sha256: dict[str, str]
    mends: dict[str, Mend]
    notes: tuple[str, ...]
    model: nn.Module
    layers: tuple[Layer, ...]
    source_sha256: dict[str, str]
    dense_parameters: int
    price: Price
    budget: int
    landing: Landing | None = None

    @property
    def sites(self) -> dict[str, tuple[Site, ...]]:
        """Where every factorable layer runs, those too that the recipe keeps dense."""
        return find_sites(self.model, find_layers(self.model), self.data.test_inputs)

    @property
    def model_sha256(self) -> str:
        """What a table of costs is measured for."""
        return hash_model(self.model, self.sites)

    @property
    def fixed_parameters(self) -> int:
        """Parameters that no choice of ranks changes."""
        return self.dense_parameters - sum(layer.parameters for layer in self.layers)


def prepare(recipe: Recipe, folder: Path) -> Prepared:
    """Check toolchains, checkpoints, data, shapes and budget; raise the first problem as one clear error.

    `folder` is the recipe's own, to which its paths are relative.
    """
    recipe = complete_recipe(recipe, folder)
    _check_toolchains(recipe)
    sources = list_sources(recipe)
    for reference in [name for source in sources for name in (source.factory, source.train) if name]:
        load_function(reference, folder)  # a misspelt name must not wait for another model's training
    mends, notes = check_mergeable(recipe, folder)
    source_sha256 = {source.name: hash_source(source, folder) for source in sources}
    _check_weights(sources, folder, recipe.seed)
    data = load_data(recipe, folder)
    for source in sources:  # proven on the untrained module: a mend that cannot work must not wait for training
        if mends.get(source.name, Mend()) != Mend():
            untrained = make_model(source, folder, recipe.seed)
            mend_model(untrained, mends[source.name], data.test_inputs, name=source.name)
    model = make_model(recipe.models[0], folder, recipe.seed)
    if recipe.merge.head is not None:
        model = _join(recipe, folder, data)
        data = mark_tasks(data, model)
    _check_forward(model, data, recipe)
    layers = find_layers(model, (*recipe.ranks.exclude, *([HEADS] if data.tasks else [])))
    _check_excluded(recipe.ranks.exclude, find_layers(model))
    if not layers:
        raise InputError("the model has no linear or convolutional layer to factor", hint="see ranks.exclude")
    _check_rebuilding(model, layers, data)
    dense = count_parameters(model)
    price = _find_price(recipe, folder, model, layers, data)
    dense_cost = price.fixed + sum(price.price_layer(layer, None) or 0 for layer in layers)
    budget = _find_budget(recipe, dense_cost)
    if recipe.budget.costs is not None:  # artifacts carry what made them
        source_sha256[f"costs {recipe.budget.costs}"] = hash_file(folder / recipe.budget.costs)
    prepared = Prepared(
        recipe=recipe,
        recipe_sha256=digest(recipe),
        folder=folder,
        data=data,
        calibration_sha256={name: hash_tensors(inputs) for name, inputs in data.calibration.items()},
        test_sha256=hash_tensors((*data.test_inputs, data.test_labels)),
        tests_sha256={name: hash_tensors((*inputs, labels)) for name, (inputs, labels) in data.tests.items()},
        unlabelled_sha256={}
        if recipe.refine is None
        else {name: hash_tensors(data.list_unlabelled(name)) for name in data.calibration},
        mends=mends,
        notes=notes,
        model=model,
        layers=layers,
        source_sha256=source_sha256,
        dense_parameters=dense,
        price=price,
        budget=budget,
    )
    if recipe.ranks.threshold is None:
        for way in (choose(recipe), *recipe.compare):
            check_feasible(layers, price, budget, rank_choice(recipe, way))
    return prepared


def redraw(prepared: Prepared, seed: int) -> Prepared:
    """The same models with the data that the loader gives for another seed."""
    data = load_data(replace(prepared.recipe, seed=seed), prepared.folder)
    if isinstance(prepared.model, Headed):
        data = mark_tasks(data, prepared.model)
    hashes = {name: hash_tensors(inputs) for name, inputs in data.calibration.items()}
    return replace(prepared, data=data, calibration_sha256=hashes)


def _join(recipe: Recipe, folder: Path, data: Data) -> Headed:
    """The untrained backbone with the heads of all models."""
    bare = {source.name: make_model(source, folder, recipe.seed) for source in recipe.models}
    return join(bare, str(recipe.merge.head), data.test_inputs)


def _check_weights(sources: Sequence[Source], folder: Path, seed: int) -> None:
    """Refuse checkpoints and adapters that do not fit their model, and broken numbers."""
    for source in sources:
        if source.weights is not None:
            path = find_weights(source, folder)
            check_fits(make_model(source, folder, seed), read_shapes(path), where=str(path))
            refuse_broken(path)
        if source.adapter is not None:
            prefix = "" if source.huggingface is None else PREFIX
            expected = make_model(source, folder, seed).state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
            read_adapter(folder / source.adapter).check_fits(shapes, prefix)


def _find_budget(recipe: Recipe, dense_cost: int) -> int:
    if recipe.ranks.threshold is not None:
        return 0
    return dense_cost if recipe.budget.on is not None else resolve_budget(recipe.budget, dense_cost)


def _find_price(recipe: Recipe, folder: Path, model: nn.Module, layers: tuple[Layer, ...], data: Data) -> Price:
    """What the budget counts."""
    unit = recipe.budget.unit
    if unit == "flops":
        return price_flops(model, layers, data.test_inputs)
    if recipe.budget.costs is not None:
        path = folder / recipe.budget.costs
        table = read_table(path, unit)
        sha256 = hash_model(model, find_sites(model, find_layers(model), data.test_inputs))
        measured = price_table(table, layers, sha256, str(path))
        if recipe.budget.on is None:
            return measured
    return price_parameters(count_parameters(model) - sum(layer.parameters for layer in layers))


def _check_toolchains(recipe: Recipe) -> None:
    for name in recipe.export.formats:
        module, _, extra = EXPORTERS[name]
        package = {"onnx": "onnxscript", "tflite": "litert_torch", "executorch": "executorch"}[name]
        if importlib.util.find_spec(package) is None or not any(find_version(runtime) for runtime in RUNTIMES[name]):
            raise InputError(
                f"export.formats names {name}, whose toolchain is not installed ({module} needs {package})",
                hint=f"pip install '{extra}', or leave {name} out",
            )


def _check_forward(model: nn.Module, data: Data, recipe: Recipe) -> None:
    samples = [(f"calibration of {name!r}", inputs) for name, inputs in data.calibration.items()]
    for what, inputs in [*samples, ("test_inputs", data.test_inputs)]:
        try:
            with torch.inference_mode():
                output = model(*(tensor[:2] for tensor in inputs))
        except (RuntimeError, TypeError, ValueError, IndexError) as failure:
            raise InputError(
                f"the model does not take {what} of shape {[list(tensor.shape) for tensor in inputs]}: {failure}",
                hint=f"make {recipe.data.origin} give what the model's forward takes",
            ) from failure
    if not isinstance(output, torch.Tensor) or output.ndim != data.test_labels.ndim + 1:
        wanted = "(batch, classes)" if data.test_labels.ndim == 1 else "(batch, positions, classes)"
        raise InputError(f"the model does not return logits of shape {wanted}", hint="wrap it in the factory")
    classes = output.shape[-1]
    counts = model.classes if isinstance(model, Headed) else [classes] * len(recipe.models)
    for source, count in zip(recipe.models, counts, strict=True):
        if source.labels and len(source.labels) != count:
            raise InputError(
                f"model {source.name!r} has {count} classes, its `labels` name {len(source.labels)}",
                hint="name every class once, in the order of the model's outputs",
            )
    counted = data.test_labels[data.test_labels != IGNORED]
    low, high = (int(counted.min()), int(counted.max())) if len(counted) else (-1, -1)
    if low < 0 or high >= classes:
        raise InputError(
            f"test_labels run from {low} to {high}, the model has {classes} classes", hint="correct the labels"
        )


def _check_excluded(patterns: tuple[str, ...], layers: tuple[Layer, ...]) -> None:
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(
                f"ranks.exclude: {pattern!r} matches no layer that could be factored",
                hint=f"the layers are {', '.join(names)}",
            )


def _check_rebuilding(model: nn.Module, layers: tuple[Layer, ...], data: Data) -> None:
    """Run the model once with every layer factored: one that reaches into a layer's weight breaks here, by name."""
    sample = tuple(tensor[:2] for tensor in data.test_inputs)
    if _runs_factored(model, layers, sample):
        return
    broken = [layer.name for layer in layers if not _runs_factored(model, (layer,), sample)]
    raise InputError(
        f"the model does not run once these layers are factored: {', '.join(broken) or 'all together'};"
        " it reads their weights itself instead of calling them",
        hint=f"keep them dense: ranks.exclude = {broken}".replace("'", '"'),
    )


def _runs_factored(model: nn.Module, layers: tuple[Layer, ...], sample: Inputs) -> bool:
    try:
        with torch.inference_mode():
            rebuild(model, {layer.name: Factors(rank=1) for layer in layers})(*sample)
    except (AttributeError, RuntimeError, TypeError, IndexError):
        return False
    return True


def hash_tensors(tensors: Inputs) -> str:
    """SHA-256 over types, shapes and values."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()
