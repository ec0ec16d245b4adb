"""The stored result of landing a latency budget: the cost table, and the budget in its unit for the ranks.

Landing itself needs the device and is in rankship_benchmarks; after it the host builds without the device.
"""

from dataclasses import replace
from pathlib import Path

from rankship_pipeline.flow.budget import price_measured, price_recipe
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import CostTable, Landing
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.ranks.budget import check_feasible
from rankship_pipeline.recipe.choices import choose, rank_choice

_KIND, _TABLE, _LANDING = "landing", "cost-table.json", "landing.json"


def allow(prepared: Prepared, table: CostTable, asked: int) -> Budgeted:
    """The recipe with `asked` as its budget, in the cost table's unit."""
    where = f"the cost table of {table.device}, {table.measured_utc}"
    price = price_measured(prepared, table, where)
    check_feasible(prepared.layers, price, asked, rank_choice(prepared.recipe, choose(prepared.recipe)))
    return Budgeted(_name_costs(prepared, table), price, asked)


def _name_costs(prepared: Prepared, table: CostTable) -> Prepared:
    """The recipe with a landing's cost table among its sources."""
    sources = {**prepared.source_sha256, f"costs on {table.device}": digest(table)}
    return replace(prepared, source_sha256=sources)


def keep_landing(prepared: Prepared, store: Store, table: CostTable, landing: Landing) -> None:
    """Store how a recipe's budget was met, for later builds of the same recipe, models and data."""

    def make(target: Path) -> None:
        (target / _TABLE).write_text(encode(table), encoding="utf-8")
        (target / _LANDING).write_text(encode(landing), encoding="utf-8")

    store.produce(_KIND, _list_ingredients(prepared), make)


def is_landed(prepared: Prepared, store: Store) -> bool:
    """Whether the recipe can be built without measuring first."""
    return prepared.recipe.budget.on is None or store.find(_KIND, _list_ingredients(prepared)) is not None


def settle_budget(prepared: Prepared, store: Store) -> Budgeted:
    """The recipe with its own budget, or with the one landed on a device; InputError if it is not landed yet."""
    if prepared.recipe.budget.on is None:
        return price_recipe(prepared)
    table, landing = _read_landing(prepared, store)
    return replace(allow(prepared, table, landing.shipped.asked_ns), landing=landing)


def find_landing(prepared: Prepared, store: Store) -> tuple[Prepared, Landing | None]:
    """The recipe with all its sources, and how its budget was met on a device; InputError if it is not landed yet.

    None for a budget that needs no device.
    """
    if prepared.recipe.budget.on is None:
        return prepared, None
    table, landing = _read_landing(prepared, store)
    return _name_costs(prepared, table), landing


def _read_landing(prepared: Prepared, store: Store) -> tuple[CostTable, Landing]:
    entry = store.find(_KIND, _list_ingredients(prepared))
    if entry is None:
        name, device = prepared.recipe.name, prepared.recipe.budget.on
        message = f"the latency budget of {name} is not landed on {device} yet, so its ranks are not known"
        raise InputError(message, hint="`rankship run` measures there first, then builds")
    table = decode(CostTable, entry.read(_TABLE).read_bytes(), where=str(entry.folder))
    landing = decode(Landing, entry.read(_LANDING).read_bytes(), where=str(entry.folder))
    return table, landing


def _list_ingredients(prepared: Prepared) -> dict[str, object]:
    return {
        "recipe": prepared.recipe_sha256,
        "sources": prepared.source_sha256,
        "data": [prepared.calibration_sha256, prepared.test_sha256],
        "code": hash_code(),
        "versions": list_versions(),
    }
