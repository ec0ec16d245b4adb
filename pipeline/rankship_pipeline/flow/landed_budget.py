"""The stored result of landing a latency budget: the cost tables, and the budget in their unit for the ranks.

Landing itself needs the device and is in rankship_benchmarks; after it the host builds without the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankship_pipeline.flow.budget import price_measured, price_recipe
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.landing import Landing
from rankship_pipeline.foundation.records import CostTable, RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.ranks.budget import check_feasible, keep_to_method
from rankship_pipeline.ranks.joint_price import mean_limit, mean_price, share_ways
from rankship_pipeline.ranks.price import Price
from rankship_pipeline.recipe.choices import choose, rank_choice

_KIND, _TABLES, _LANDING = "landing", ("cost-table.json", "cost-table-beside.json"), "landing.json"


@dataclass(frozen=True)
class Priced:
    """A recipe with a cost table, and its price, for each limit of its budget; two offer the same ways."""

    prepared: Prepared
    tables: tuple[CostTable, ...]
    prices: tuple[Price, ...]

    def find_smallest(self) -> list[int]:
        """The lowest possible cost of the whole model by each table."""
        return [self._find_least(price) for price in self.prices]

    def predict(self, plan: RankPlan) -> tuple[int, ...]:
        """What a plan costs by each table."""
        ways = {layer.name: layer.stored for layer in plan.layers}
        return tuple(price.price_ways(self.prepared.layers, ways) for price in self.prices)

    def allow(self, asked: Sequence[int], weight: float | None = None) -> Budgeted:
        """The recipe with what is `asked` of each table as its budget.

        Of two it is the limit on their mean, in which the first counts by `weight`, and at least the lowest that can be
        had. BudgetInfeasible for less than the lowest possible cost by a single table.
        """
        named = _name_costs(self.prepared, self.tables, weight)
        if weight is None:
            ((price,), (budget,)) = self.prices, asked
            choice = rank_choice(self.prepared.recipe, choose(self.prepared.recipe))
            check_feasible(self.prepared.layers, price, budget, choice)
            return Budgeted(named, price, budget)
        (first, second), (one, two) = self.prices, asked
        price = mean_price(first, second, weight)
        return Budgeted(named, price, max(mean_limit(one, two, weight), self._find_least(price)))

    def _find_least(self, price: Price) -> int:
        choice = keep_to_method(self.prepared.recipe.ranks)
        return price.find_smallest(self.prepared.layers, choice.step, choice.forms)


def price_tables(prepared: Prepared, tables: Sequence[CostTable]) -> Priced:
    """The recipe priced by a table, or by those of both phases; InputError for a table of another model or phase."""
    prices = tuple(
        price_measured(prepared, table, f"the cost table of {table.device}, {table.measured_utc}") for table in tables
    )
    return Priced(prepared, tuple(tables), prices if len(prices) == 1 else share_ways(prepared.layers, *prices))


def _name_costs(prepared: Prepared, tables: Sequence[CostTable], weight: float | None) -> Prepared:
    """The recipe with a landing's cost tables among its sources, and how they are weighed."""
    names = [f"costs on {table.device}" + ("" if weight is None else f", {table.part}") for table in tables]
    sources = {name: digest(table) for name, table in zip(names, tables, strict=True)}
    if weight is not None:
        sources[f"costs on {tables[0].device}, weight"] = digest(weight)
    return replace(prepared, source_sha256={**prepared.source_sha256, **sources})


def keep_landing(prepared: Prepared, store: Store, tables: Sequence[CostTable], landing: Landing) -> None:
    """Store how a recipe's budget was met, for later builds of the same recipe, models and data."""

    def make(target: Path) -> None:
        for name, table in zip(_TABLES, tables, strict=False):
            (target / name).write_text(encode(table), encoding="utf-8")
        (target / _LANDING).write_text(encode(landing), encoding="utf-8")

    store.produce(_KIND, _list_ingredients(prepared), make)


def is_landed(prepared: Prepared, store: Store) -> bool:
    """Whether the recipe can be built without measuring first."""
    return prepared.recipe.budget.on is None or store.find(_KIND, _list_ingredients(prepared)) is not None


def settle_budget(prepared: Prepared, store: Store) -> Budgeted:
    """The recipe with its own budget, or with the one landed on a device; InputError if it is not landed yet."""
    if prepared.recipe.budget.on is None:
        return price_recipe(prepared)
    tables, landing = _read_landing(prepared, store)
    asked = [one.shipped.asked_ns for one in landing.phases]
    return replace(price_tables(prepared, tables).allow(asked, landing.shipped.weight), landing=landing)


def find_landing(prepared: Prepared, store: Store) -> tuple[Prepared, Landing | None]:
    """The recipe with all its sources, and how its budget was met on a device; InputError if it is not landed yet.

    None for a budget that needs no device.
    """
    if prepared.recipe.budget.on is None:
        return prepared, None
    tables, landing = _read_landing(prepared, store)
    return _name_costs(prepared, tables, landing.shipped.weight), landing


def _read_landing(prepared: Prepared, store: Store) -> tuple[list[CostTable], Landing]:
    entry = store.find(_KIND, _list_ingredients(prepared))
    if entry is None:
        name, device = prepared.recipe.name, prepared.recipe.budget.on
        message = f"the latency budget of {name} is not landed on {device} yet, so its ranks are not known"
        raise InputError(message, hint="`rankship run` measures there first, then builds")
    where = str(entry.folder)
    landing = decode(Landing, entry.read(_LANDING).read_bytes(), where=where)
    names = _TABLES[: len(landing.phases)]
    return [decode(CostTable, entry.read(name).read_bytes(), where=where) for name in names], landing


def _list_ingredients(prepared: Prepared) -> dict[str, object]:
    return {
        "recipe": prepared.recipe_sha256,
        "sources": prepared.source_sha256,
        "data": [prepared.calibration_sha256, prepared.test_sha256],
        "code": hash_code(),
        "versions": list_versions(),
    }
