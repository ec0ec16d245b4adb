"""Where a result of a Python session comes from: its recipe with the models and data it stands for, and its store."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankship_pipeline.models.opened import Held

from rankship.recipe import Recipe
from rankship_pipeline.flow.preflight import Prepared, prepare
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import ensure_writable
from rankship_pipeline.foundation.store import Store

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Origin:
    """A recipe, what it stands for in this session, and where its stages keep their results.

    `given` are the models as their users hold them, `held` as the stages take them; a recipe file's models and data are
    its own, and both are empty.
    """

    recipe: Recipe
    held: Held | None
    given: Mapping[str, "nn.Module"]
    store: Store
    steps: Steps
    folder: Path

    def change(self, **tables: Any) -> "Origin":  # noqa: ANN401 - a recipe's keys
        """The same models and data under a recipe with other tables."""
        return replace(self, recipe=replace(self.recipe, **tables).check("the call"))

    @cached_property
    def prepared(self) -> Prepared:
        """The recipe with everything checked that can be checked before long work."""
        ensure_writable(self.store.root, "store")
        with self.steps.step("check the models and the data"):
            prepared = prepare(self.recipe, self.folder, self.held)
        for note in prepared.notes:
            self.steps.note(note)
        return prepared

    @cached_property
    def stages(self) -> Stages:
        """The recipe's stages, each of which reads its result from the store or makes it."""
        return Stages(self.prepared, self.store, self.steps)
