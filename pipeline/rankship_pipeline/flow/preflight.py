"""Checks everything that can be wrong with a recipe in seconds, before any long work starts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from torch import nn

from rankship_pipeline.align.descent import caution
from rankship_pipeline.align.differences import check_mergeable
from rankship_pipeline.align.make_alike import Mend, mend_model
from rankship_pipeline.align.neurons import mark_neurons
from rankship_pipeline.flow.budget import check_budget
from rankship_pipeline.flow.checks import BEFORE_DATA, WITH_DATA, check_toolchains
from rankship_pipeline.flow.idle import keep_idle_dense
from rankship_pipeline.flow.judging import Court, find_judging, load_own_score
from rankship_pipeline.flow.pace import measure_pace
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.range_checks import check_ranges
from rankship_pipeline.flow.replaceable import keep_dense
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.models.data import Data, Held, load_data
from rankship_pipeline.models.heads import HEADS, Headed, join, mark_tasks
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.models.model_config import complete_recipe
from rankship_pipeline.models.opened import OpenedSource, open_sources
from rankship_pipeline.models.weights import hash_tensors
from rankship_pipeline.ranks.price import read_table
from rankship_pipeline.recipe.choices import Recipe, choose, list_sources


def prepare(recipe: Recipe, folder: Path, held: Held | None = None) -> Prepared:
    """Check toolchains, checkpoints, data, shapes and budget; raises the first problem as one error.

    Paths in the recipe are relative to `folder`. `held` are the models and data of a Python session, for a recipe with
    `held`.
    """
    return finish_checks(identify(recipe, folder, held))


def identify(recipe: Recipe, folder: Path, held: Held | None = None) -> Prepared:
    """Open a recipe's models and data and hash them: enough to find its build, whose making passed all other checks."""
    check_toolchains(recipe)  # before the models' files, which may have to be fetched
    recipe = complete_recipe(recipe, folder)
    sources = open_sources(list_sources(recipe), folder, recipe.seed, None if held is None else held.models)
    mends, notes = check_mergeable(recipe, sources)
    source_sha256 = {name: opened.sha256 for name, opened in sources.items()}
    for check in BEFORE_DATA:
        check(recipe, sources)
    notes = (*(remark for opened in sources.values() for remark in opened.remarks), *notes)
    notes = (*notes, *caution(recipe, sources))
    own = load_own_score(recipe.quality, folder)
    data, model = _join(recipe, sources, _find_data(recipe, folder, sources, mends, held))
    judging = find_judging(recipe, model, data)
    layers = find_layers(model, (*recipe.ranks.exclude, *([HEADS] if data.tasks else [])))
    layers = tuple(replace(layer, only_factored=not _needs_sides(recipe)) for layer in layers)
    if any("width" in forms for forms in (recipe.ranks.forms, *(way.forms for way in recipe.compare))):
        layers = mark_neurons(model, layers, data.test_inputs)
    prepared = Prepared(
        recipe=recipe,
        recipe_sha256=digest(recipe),
        folder=folder,
        sources=sources,
        data=data,
        **_hash_data(data, recipe),
        mends=mends,
        notes=(*notes, *filter(None, (judging.note,))),
        model=model,
        layers=layers,
        source_sha256=source_sha256,
        court=Court(judging, own),
        checked=False,
    )
    if own is not None:
        source_sha256[f"quality {recipe.quality.function}"] = own.sha256
    if recipe.budget.costs is not None:  # an artifact records the hashes of its sources
        read_table(folder / recipe.budget.costs, recipe.budget.unit)
        source_sha256[f"costs {recipe.budget.costs}"] = hash_file(folder / recipe.budget.costs)
    return prepared


def finish_checks(prepared: Prepared) -> Prepared:
    """Run the model, trace it and price it; gives the recipe with the layers that can be factored."""
    for check in WITH_DATA:
        check(prepared)
    prepared = replace(prepared, pace=measure_pace(prepared.model, prepared.data.test_inputs, prepared.layers))
    prepared = replace(keep_dense(keep_idle_dense(prepared)), checked=True)
    check_budget(prepared)
    check_ranges(prepared)
    return prepared


def _needs_sides(recipe: Recipe) -> bool:
    """Whether any way of the recipe merges layers, solves them for their outputs in order, or rounds their weights."""
    ways = (choose(recipe), *recipe.compare)
    is_merged = len(list_sources(recipe)) > 1 or any(way.merge == "sequential" for way in ways)
    return is_merged or recipe.precision.weights != ("float32",)


def redraw(prepared: Prepared, seed: int) -> Prepared:
    """The same models with the loader's data for another seed."""
    data = _load(replace(prepared.recipe, seed=seed), prepared.folder, prepared.sources, prepared.mends)
    if isinstance(prepared.model, Headed):
        data = mark_tasks(data, prepared.model)
    return replace(prepared, data=data, **_hash_data(data, prepared.recipe))


def _find_data(
    recipe: Recipe,
    folder: Path,
    sources: Mapping[str, OpenedSource],
    mends: Mapping[str, Mend],
    held: Held | None,
) -> Data:
    if not recipe.data.held:
        return _load(recipe, folder, sources, mends)
    if held is None:
        raise InputError(
            "the recipe's data are tensors of a Python session (`held`), and none were given",
            hint="name files in [data]",
        )
    return held.data


def _load(recipe: Recipe, folder: Path, sources: Mapping[str, OpenedSource], mends: Mapping[str, Mend]) -> Data:
    """Loads the data; the model whose answers stand for missing labels is mended first, as it is built."""
    name = recipe.models[0].name
    return load_data(recipe, folder, sources, lambda model, inputs: mend_model(model, mends[name], inputs, name=name))


def _join(recipe: Recipe, sources: Mapping[str, OpenedSource], data: Data) -> tuple[Data, nn.Module]:
    """The data and the untrained model: the first model, or the backbone with all heads and data with task numbers."""
    models = {source.name: sources[source.name].make() for source in recipe.models[: None if recipe.merge.head else 1]}
    if recipe.merge.head is None:
        return data, models[recipe.models[0].name]
    joined = join(models, recipe.merge.head, data.test_inputs)
    return mark_tasks(data, joined), joined


class _DataHashes(TypedDict):
    calibration_sha256: dict[str, str]
    test_sha256: str
    tests_sha256: dict[str, str]
    unlabelled_sha256: dict[str, str]


def _hash_data(data: Data, recipe: Recipe) -> _DataHashes:
    """The hashes of all data that shape a result; what refinement alone sees counts where there is one."""
    labels = () if data.test_labels is None else (data.test_labels,)
    refined = () if recipe.refine is None else data.calibration
    return {
        "calibration_sha256": {name: hash_tensors(inputs) for name, inputs in data.calibration.items()},
        "test_sha256": hash_tensors((*data.test_inputs, *labels)),
        "tests_sha256": {name: hash_tensors((*inputs, labels)) for name, (inputs, labels) in data.tests.items()},
        "unlabelled_sha256": {name: hash_tensors(data.list_unlabelled(name)) for name in refined},
    }
