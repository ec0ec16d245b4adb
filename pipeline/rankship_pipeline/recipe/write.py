"""Writes a recipe as TOML: only the values that differ from the defaults, in the order of the records."""

from pathlib import Path
from typing import Any

from rankship_pipeline.foundation.codec import to_plain
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.recipe.choices import Recipe


def format_recipe(recipe: Recipe) -> str:
    """The text of a recipe file that decodes to this recipe."""
    import tomlkit

    return tomlkit.dumps(_order(to_plain(recipe, without_defaults=True)))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe file in one step."""
    write_atomic(path, format_recipe(recipe).encode())


def _order(table: dict[str, Any]) -> dict[str, Any]:
    """Put plain values before tables: in TOML, keys after a table's heading belong to that table."""
    tables = {key: value for key, value in table.items() if _is_table(value)}
    return {key: value for key, value in table.items() if key not in tables} | {
        key: [_order(one) for one in value] if isinstance(value, list) else _order(value)
        for key, value in tables.items()
    }


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))
