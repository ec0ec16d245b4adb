"""Computes the whole model's budget in one unit, and checks that a plan can meet it."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil

from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import CostUnit
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.price import Price
from rankship_pipeline.recipe.budget import TOKEN_TIMES, Budget
from rankship_pipeline.recipe.choices import RankChoice
from rankship_pipeline.recipe.rank_methods import RANK_METHODS


def resolve_budget(budget: Budget, dense: int, unit: CostUnit = "parameters") -> int:
    """The budget of the whole model in this unit; `dense` is the dense model's cost, for budgets that are shares."""
    ((key, value),) = budget.amounts.items()
    if key.startswith("kept_"):
        return int(Fraction(str(value)) * dense)  # 0.7 of 350 is 245, not 244.999…
    of_bytes = Fraction(1) if unit == "bytes" else Fraction(1, 4)  # else float32 parameters; nanoseconds
    scales = {"size_bytes": of_bytes, "latency_us": Fraction(1000), "latency_ms": Fraction(1_000_000)}
    scales |= dict.fromkeys(TOKEN_TIMES, Fraction(1_000_000))
    return int(Fraction(str(value)) * scales.get(key, 1))


def keep_to_method(choice: RankChoice) -> RankChoice:
    """The choice within its method's limits: step 1 for methods with their own step, only the SVD for some methods."""
    traits = RANK_METHODS[choice.method]
    choice = replace(choice, step=1) if traits.own_step else choice
    return choice if traits.any_form else replace(choice, forms=("svd",))


def check_feasible(layers: Sequence[Layer], price: Price, budget: int, choice: RankChoice) -> None:
    """Raise BudgetInfeasible with the smallest budget that works, before any long work starts."""
    choice = keep_to_method(choice)
    smallest = price.find_smallest(layers, choice.step, choice.forms)
    if budget < smallest:
        total = price.price_dense(layers)
        share = ceil(smallest / total * 1000) / 1000
        by_share = price.unit in {"parameters", "flops"}
        asked = f"kept_{price.unit} = {share}" if by_share else f"{smallest:,} {price.unit}"
        raise BudgetInfeasible(
            f"the budget is {budget:,} {price.unit}, the smallest model at rank step {choice.step} has {smallest:,}"
            f" ({smallest / total:.3f} of the dense {total:,}; {price.fixed:,} lie outside the factorable layers)",
            hint=f"raise the budget to {asked}, or lower ranks.step",
        )
