"""Computes a recipe's price and budget, and checks that the budget can be met."""

from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import Stored
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
    computed = prepared.activations
    for one in prepared.recipe.precision.weights:
        stored = Stored(weights=one)
        if prepared.layers and not any(is_offered(layer, stored, prepared.offered) for layer in prepared.layers):
            raise InputError(
                f"precision.weights: no layer of this model can have weights of {one} with {computed} activations",
                hint="with static activations convolutions and linear layers take int8; with dynamic ones linear layers"
                " take int8, or int4 if they have a multiple of 32 inputs",
            )


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
    table = read_table(path, prepared.recipe.budget.unit)
    return price_table(table, prepared.layers, prepared.model_sha256, str(path), prepared.recipe.precision.weights)
