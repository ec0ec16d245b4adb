"""A recipe in Python: the same record that a TOML file holds, with ways to read and write one."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.recipe import choices


@record
class Recipe(choices.Recipe):
    """One run, from trained models to verified artifacts; what is left out has the default of recipe files.

    Paths are relative to the folder that `run` is given, or to the file that the recipe was read from. Constructing one
    checks nothing: `run`, `write` and `read` do, and name every mistake.

    Example:
        >>> import rankship as rs
        >>> recipe = rs.Recipe(
        ...     name="mine",
        ...     models=(rs.Source(name="a", factory="net.py:Net", weights="a.safetensors"),),
        ...     data=rs.DataChoice(loader="net.py:load"),
        ...     budget=rs.Budget(kept_parameters=0.4),
        ... )
        >>> path = recipe.write("mine.toml")
        >>> rs.Recipe.read(path) == recipe
        True

    """

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read and check a recipe file; every mistake is an InputError that names the file and the key."""
        from rankship_pipeline.recipe.rules import read_recipe

        return cls.take(read_recipe(Path(path)))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Check the recipe and write it as TOML, defaults left out; returns the path.

        What a session holds cannot be in a file: `to_recipe(FOLDER)` of a result writes models and data too.
        """
        from rankship_pipeline.recipe.rules import refuse_held
        from rankship_pipeline.recipe.write import write_recipe

        refuse_held(self, str(path), "write models and data too: small.to_recipe(FOLDER), merged or built alike")
        write_recipe(self.check(str(path)), Path(path))
        return Path(path)

    def check(self, where: str = "the recipe") -> "Recipe":
        """The recipe as its file would be read; an InputError names `where` and everything that it cannot mean."""
        from rankship_pipeline.foundation.codec import decode
        from rankship_pipeline.recipe.rules import check_recipe

        checked = decode(Recipe, json.dumps(asdict(self)), where=where)
        check_recipe(checked, where)
        return checked

    @classmethod
    def take(cls, recipe: choices.Recipe) -> "Recipe":
        """The same recipe with these methods."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(recipe)})
