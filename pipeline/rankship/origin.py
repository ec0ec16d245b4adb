"""Where a result of a Python session comes from: its recipe with the models and data it stands for, and its store."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankship.calibration import gather_calibration, gather_tests
from rankship.recipe import Recipe
from rankship.recipe_folder import write_recipe_folder
from rankship.wrapped import Wrapping, check_models, wrap_choice
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.prepared import Prepared
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable
from rankship_pipeline.foundation.store import Store, default_root, parse_folder
from rankship_pipeline.models.data import Data, Held, make_data
from rankship_pipeline.recipe.choices import DataChoice, MergeChoice, Source
from rankship_pipeline.recipe.export_choices import ExportChoice

if TYPE_CHECKING:
    from torch import nn

_BASE = "base"


@dataclass(frozen=True)
class Origin:
    """A recipe, what it stands for in this session, and where its stages keep their results.

    `held` and `wrappings` are the models and data that the session holds, and how its user holds the models; of a
    recipe file, whose models and data lie beside it in `folder`, there are none.
    """

    recipe: Recipe
    store: Store
    steps: Steps
    folder: Path
    held: Held | None = None
    wrappings: tuple[Wrapping, ...] = ()

    def change(self, *, progress: bool, **tables: Any) -> "Origin":  # noqa: ANN401 - a recipe's tables
        """The same models and data under a recipe with other tables."""
        recipe = replace(self.recipe, **{key: wrap_choice(value, self.wrappings) for key, value in tables.items()})
        return replace(self, recipe=recipe.check("the call"), steps=Steps(quiet=not progress))

    @cached_property
    def prepared(self) -> Prepared:
        """The recipe with everything checked that can be checked before long work."""
        ensure_writable(self.store.root, "store")
        with self.steps.step("check the models and the data"):
            prepared = prepare(self.recipe, self.folder, self.held)
        for note in prepared.notes:
            self.steps.note(note)
        return prepared

    def open_stages(self) -> Stages:
        """The recipe's stages, each of which reads its result from the store or makes it.

        What they hold in memory lives as long as they do, so no result of a session keeps them.
        """
        return Stages(self.prepared, self.store, self.steps)

    @property
    def recipe_sha256(self) -> str:
        """The recipe's hash, as artifacts carry it."""
        return digest(self.recipe)

    def write_recipe(self, folder: str | os.PathLike[str] | None, factory: object) -> Recipe:
        """The recipe; or one whose files are written to `folder`."""
        if folder is None:
            return self.recipe
        if self.held is None:
            raise InputError(f"the recipe has its files in {self.folder} already", hint="copy that folder")
        return write_recipe_folder(self.recipe, self.folder, self.held, self.wrappings, Path(folder), factory)


def open_store(given: str | os.PathLike[str] | None) -> Store:
    """The artifact store in this folder; None: $RANKSHIP_STORE, else the user's cache."""
    store = Store(default_root() if given is None else parse_folder(str(given)))
    ensure_writable(store.root, "store")
    store.sweep()
    return store


def open_origin(  # noqa: PLR0913 - what a call may give
    models: "Mapping[str, nn.Module]",
    calibration: object,
    *,
    base: "nn.Module | None" = None,
    test: object = None,
    unlabelled: object = None,
    merge: MergeChoice,
    seed: int,
    name: str,
    store: str | os.PathLike[str] | None,
    progress: bool,
    **tables: Any,  # noqa: ANN401 - a recipe's tables
) -> Origin:
    """A session's models and data under a recipe that says so."""
    check_models({**models, **({} if base is None else {_BASE: base})})
    inputs, wrappings = gather_calibration(models, calibration, "calibration")
    wrapped = {one.name: one.wrap() for one in wrappings}
    if base is not None:
        wrapped[_BASE] = replace(wrappings[0], name=_BASE, given=base).wrap()
        merge = replace(merge, base=Source(name=_BASE, held=True))
    recipe = Recipe(
        name=name,
        models=tuple(Source(name=one, held=True) for one in models),
        data=DataChoice(held=True),
        merge=wrap_choice(merge, wrappings),
        export=ExportChoice(formats=()),
        seed=seed,
        **{key: wrap_choice(value, wrappings) for key, value in tables.items()},
    ).check("the call")
    found: dict[str, object] = {"calibration": inputs, **gather_tests(test, wrappings)}
    if unlabelled is not None:
        some = _choose_named(models, unlabelled)
        found["unlabelled"], _ = gather_calibration(some, unlabelled, "unlabelled", wrappings[0].inputs, most=None)
    if "test_inputs" not in found:
        found["test_inputs"] = Data(inputs, (), None).pool_calibration()
    held = Held(wrapped, make_data(found, recipe, "the call"))
    return Origin(recipe, open_store(store), Steps(quiet=not progress), Path.cwd(), held, wrappings)


def _choose_named(models: "Mapping[str, nn.Module]", given: object) -> "Mapping[str, nn.Module]":
    """The models that a mapping names; all of them, where it names others or is no mapping."""
    if not isinstance(given, Mapping) or not set(given) <= set(models):
        return models
    return {name: model for name, model in models.items() if name in given}
