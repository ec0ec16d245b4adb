"""Computes a recipe's price and budget, and checks that the budget can be met."""

from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.foundation.artifact_key import WHOLE, describe_timed
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import CostTable, Stored
from rankship_pipeline.quantise.sizes import is_offered
from rankship_pipeline.ranks.budget import check_feasible, resolve_budget
from rankship_pipeline.ranks.price import (
    Price,
    price_bytes,
    price_flops,
    price_parameters,
    price_table,
    read_table,
)
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import choose, find_unit, rank_choice


def price_recipe(prepared: Prepared) -> Budgeted:
    """The price and budget from the recipe; for a budget that is not landed on a device."""
    price = _find_price(prepared)
    dense = price.price_dense(prepared.layers)
    recipe = prepared.recipe
    budget = dense if recipe.ranks.threshold else resolve_budget(recipe.budget, dense, price.unit)
    return Budgeted(prepared, price, budget)


def check_budget(prepared: Prepared) -> None:
    """Check that every way of the recipe can meet its budget; BudgetInfeasible with the smallest that works.

    A budget to land on a device is checked there; here only its cost table is checked, if the recipe names one.
    """
    _check_types(prepared)
    if prepared.recipe.budget.on is not None:
        if prepared.recipe.budget.costs is not None:
            _read_price(prepared)
        return
    budgeted = price_recipe(prepared)
    if prepared.recipe.ranks.threshold is None:
        for way in (choose(prepared.recipe), *prepared.recipe.compare):
            check_feasible(prepared.layers, budgeted.price, budgeted.budget, rank_choice(prepared.recipe, way))


def _check_types(prepared: Prepared) -> None:
    """Check that every type of weights can be had by a layer at least; InputError names one that cannot."""
    computed, recipe = prepared.activations, prepared.recipe
    if recipe.precision.weights == ("float32",):
        return
    if computed == "static" and recipe.export.axes:
        raise InputError(
            "precision: a graph with static activations takes no lengths but the batch's",
            hint='leave out export.axes, or take activations = "dynamic"',
        )
    if recipe.budget.costs is not None:
        _check_timed(prepared)
    found = {
        one: any(is_offered(layer, Stored(weights=one), prepared.offered) for layer in prepared.layers)
        for one in recipe.precision.weights
    }
    missing = [one for one, is_there in found.items() if not is_there]
    is_chosen = find_unit(recipe) not in {"parameters", "flops"}  # of several types, one for each layer
    if prepared.layers and missing and not (is_chosen and any(found.values())):
        raise InputError(
            f"precision.weights: no layer of this model can have weights of {', '.join(missing)} with {computed}"
            " activations",
            hint="docs/recipes.md, Bits, says what each format runs; precision.activations may be static, dynamic or"
            " float32",
        )


def _check_timed(prepared: Prepared) -> None:
    """Check that the table of costs has layers of every type; InputError names the type that it lacks."""
    path = prepared.folder / str(prepared.recipe.budget.costs)
    table = read_table(path, prepared.recipe.budget.unit)
    timed = {one.weights for options in table.layers.values() for one in options}
    for one in prepared.recipe.precision.weights:
        if one not in timed:
            raise InputError(f"{path} has no layer with weights of {one}", hint="leave it out of precision.weights")


def _find_price(prepared: Prepared) -> Price:
    if prepared.recipe.budget.unit == "flops":
        return price_flops(prepared.model, prepared.layers, prepared.data.test_inputs)
    if prepared.recipe.budget.costs is not None:
        return _read_price(prepared)
    if find_unit(prepared.recipe) == "bytes":
        return price_bytes(prepared.fixed_parameters, prepared.recipe.precision.weights, prepared.offered)
    return price_parameters(prepared.fixed_parameters)


def _read_price(prepared: Prepared) -> Price:
    path = prepared.folder / str(prepared.recipe.budget.costs)
    return price_measured(prepared, read_table(path, prepared.recipe.budget.unit), str(path))


def price_measured(prepared: Prepared, table: CostTable, where: str) -> Price:
    """The price from a cost table; InputError naming `where` if it is of another model or of other activations."""
    weights, own = prepared.recipe.precision.weights, prepared.activations
    _refuse_other_part(prepared.recipe.budget, table, where)
    if weights != ("float32",) and table.activations not in {None, own}:
        raise InputError(
            f"{where} has layers with {table.activations} activations, the recipe computes {own} ones",
            hint=f'measure them again: `rankship costs`, or take precision.activations = "{table.activations}"',
        )
    return price_table(table, prepared.layers, prepared.hash_model(table.part, table.format), where, weights)


def _refuse_other_part(budget: Budget, table: CostTable, where: str) -> None:
    """Raise InputError if a table has the times of something else than the budget is for."""
    asked = [(one.part, None if one.part == WHOLE else one.prompt) for one in budget.limits]
    if (table.part, table.prompt_tokens) not in asked:
        raise InputError(
            f"{where} has times of {describe_timed(table.part, table.prompt_tokens)}, the budget is for"
            f" {' and '.join(describe_timed(*one) for one in asked)}",
            hint="name the table of the same phase: `rankship costs` measures those of both",
        )
