"""Rank allocation: which layer is stored how, so that the whole model meets a budget exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.factors.forms import Candidate, count_parameters, list_operators
from rankship_pipeline.foundation.errors import BudgetInfeasible
from rankship_pipeline.foundation.records import Factors, LayerRank, RankPlan
from rankship_pipeline.models.layers import Layer
from rankship_pipeline.ranks.price import Ask, Price, price_parameters
from rankship_pipeline.recipe.choices import Budget, RankChoice

Choices = dict[str, Factors | None]


@dataclass(frozen=True)
class Curve:
    """Measured damage (nats) of one layer at some error shares, both ascending; see sensitivity.py."""

    errors: tuple[float, ...]
    damages: tuple[float, ...]

    def read(self, error: float) -> float:
        """Damage at an error share: log-linear between the measured points, proportional below the first."""
        if error <= 0 or not self.errors:
            return 0.0
        if error <= self.errors[0]:
            return self.damages[0] * error / self.errors[0]
        logs = np.interp(np.log(error), np.log(self.errors), np.log(self.damages))
        return float(np.exp(logs))


@dataclass(frozen=True)
class LayerStats:
    """What allocation knows of one layer.

    `plain` are the σ² of its weight and `energy` those of the whitened weight, falling. `candidates` are all efficient
    ways to store it for less than dense, by rising cost; `ask` is what their costs come from. `curve` is its measured
    damage where the sensitivity is one that is measured. With a curvature in the metric `nats` is the divergence that
    losing all of it is predicted to bring (see calibrate.collect_curvatures).
    """

    layer: Layer
    plain: NDArray[np.float64]
    energy: NDArray[np.float64]
    candidates: tuple[Candidate, ...]
    curve: Curve | None = None
    nats: float | None = None
    interference: float | None = None
    ask: Ask = count_parameters

    @property
    def dense_cost(self) -> int:
        """What the layer costs as it is."""
        return self.find_cost(None)

    def find_cost(self, factors: Factors | None) -> int:
        """What the layer costs stored so."""
        cost = self.ask(self.layer, factors)
        if cost is None:
            message = f"{self.layer.name} is not on offer as {factors}"
            raise KeyError(message)
        return cost

    def predict_error(self, factors: Factors | None) -> float:
        """Share of the output energy lost: Σ_{j>k} σ_j² / Σ σ_j² for an SVD; 0 when dense."""
        if factors is None:
            return 0.0
        known = [candidate.error for candidate in self.candidates if candidate.factors == factors]
        if known:
            return known[0]
        total = float(self.energy.sum())
        return float(self.energy[factors.rank :].sum()) / total if total else 0.0

    def predict_damage(self, error: float, sensitivity: str) -> float:
        """What an error share costs the model, in the sensitivity's own unit (see SENSITIVITIES in recipe.py)."""
        if sensitivity == "kl" and self.curve is not None:
            return self.curve.read(error)
        if sensitivity == "gradient" and self.nats is not None:
            return self.nats * error
        return error

    def list_ranks(self, step: int) -> list[int]:
        """Multiples of `step` at which an SVD is cheaper than dense, ascending; empty where there is none."""
        limit = min(self.layer.rows, self.layer.columns)
        return [k for k in range(step, limit + 1, step) if self.layer.count_factored(k) < self.layer.parameters]


Allocator = Callable[[Sequence[LayerStats], int, RankChoice], Choices]


def resolve_budget(budget: Budget, dense: int) -> int:
    """The budget of the whole model in its unit; `dense` is what the dense model costs, for budgets that are shares."""
    ((key, value),) = budget.amounts.items()
    if key.startswith("kept_"):
        return int(Fraction(str(value)) * dense)  # 0.7 of 350 is 245, not 244.999…
    # float32 parameters; nanoseconds
    scales = {"size_bytes": Fraction(1, 4), "latency_us": Fraction(1000), "latency_ms": Fraction(1_000_000)}
    return int(Fraction(str(value)) * scales.get(key, 1))


def keep_to_method(choice: RankChoice) -> RankChoice:
    """The choice as its method can take it: ARP's ranks are its own, down to 1, and it knows matrices only."""
    if choice.method == "arp":
        return replace(choice, step=1, forms=("svd",))
    return replace(choice, forms=("svd",)) if choice.method in {"ara", "ara-original"} else choice


def check_feasible(layers: Sequence[Layer], price: Price, budget: int, choice: RankChoice) -> None:
    """Raise BudgetInfeasible, naming the smallest budget that works, before any long work starts."""
    choice = keep_to_method(choice)
    smallest = price.fixed + sum(price.find_least(layer, choice.step, choice.forms) for layer in layers)
    if budget < smallest:
        total = price.fixed + sum(price.ask(layer, None) or 0 for layer in layers)
        share = ceil(smallest / total * 1000) / 1000
        by_share = price.unit in {"parameters", "flops"}
        asked = f"kept_{price.unit} = {share}" if by_share else f"{smallest:,} {price.unit}"
        raise BudgetInfeasible(
            f"the budget is {budget:,} {price.unit}, the smallest model at rank step {choice.step} has {smallest:,}"
            f" ({smallest / total:.3f} of the dense {total:,}; {price.fixed:,} lie outside the factorable layers)",
            hint=f"raise the budget to {asked}, or lower ranks.step",
        )


def allocate(
    stats: Sequence[LayerStats], fixed_parameters: int, budget: int, choice: RankChoice, price: Price | None = None
) -> RankPlan:
    """Choose factors or dense for every layer by `choice.method`; the plan's cost never exceeds the budget.

    `fixed_parameters` are those outside the factorable layers. The budget is in the unit of the `price` that the
    `stats` were made with; None: parameters. With ARP's fixed threshold the budget is what comes out.
    """
    price = price or price_parameters(fixed_parameters)
    if choice.threshold is None:
        check_feasible([entry.layer for entry in stats], price, budget, choice)
    chosen = ALLOCATORS[choice.method](stats, budget - price.fixed, choice)
    return describe_plan(stats, chosen, fixed_parameters, budget, choice, price)


def describe_plan(
    stats: Sequence[LayerStats],
    chosen: Choices,
    fixed_parameters: int,
    budget: int,
    choice: RankChoice,
    price: Price,
) -> RankPlan:
    """The record of a choice for every layer."""
    layers = tuple(_describe(entry, chosen[entry.layer.name]) for entry in stats)
    total = price.fixed + total_cost(stats, chosen)
    return RankPlan(
        method=choice.method,
        layers=layers,
        fixed_parameters=fixed_parameters,
        total_parameters=fixed_parameters + sum(layer.chosen_parameters for layer in layers),
        unit=price.unit,
        total_cost=total,
        budget_cost=budget if choice.threshold is None else total,
        predicted_error=sum(layer.relative_error for layer in layers),
    )


def _describe(stats: LayerStats, factors: Factors | None) -> LayerRank:
    layer = stats.layer
    return LayerRank(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        factors=factors,
        operators=list_operators(layer, factors),
        dense_parameters=layer.parameters,
        chosen_parameters=count_parameters(layer, factors),
        relative_error=stats.predict_error(factors),
        interference=stats.interference,
    )


def total_cost(stats: Sequence[LayerStats], chosen: Choices) -> int:
    """What the factorable layers cost under a choice."""
    return sum(entry.find_cost(chosen[entry.layer.name]) for entry in stats)


def allocate_uniform(stats: Sequence[LayerStats], available: int, _choice: RankChoice) -> Choices:
    """One share of its dense cost for every layer, the largest share that fits; then spend the rest.

    Each layer takes its best candidate within the share, and stays dense at a share of one. The remainder goes, one
    candidate at a time, to the layers with the smallest share, so that the budget is met within one step.
    """

    def choose(share: float) -> Choices:
        return {entry.layer.name: _choose_within(entry, share * entry.dense_cost) for entry in stats}

    return spend_remainder(stats, _bisect(stats, choose, available), available)


def allocate_arp(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Choices:
    """ARP's variance threshold on the merged weight (METHODS §1): k = min{k : Σ_{i≤k} σ_i² ≥ τ Σ σ_i²}.

    Factored only where k(m+n) < mn. τ is the recipe's, or the largest that meets the budget, by bisection. Ranks are
    ARP's own, not rounded to a step.
    """

    def choose(threshold: float) -> Choices:
        return {entry.layer.name: _threshold_rank(entry, threshold) for entry in stats}

    return choose(choice.threshold) if choice.threshold is not None else _bisect(stats, choose, available)


def allocate_strs(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Choices:
    """Sensitivity-based truncation rank searching (ASVD, arXiv 2312.05821 §3.3): one bound on the damage of any layer.

    Every layer is measured alone at a grid of sizes; each then takes its cheapest candidate whose damage stays under
    one common bound, the smallest bound that fits. ASVD reads perplexity, this the divergence from the dense model.
    """
    damages = {
        entry.layer.name: [entry.predict_damage(one.error, choice.sensitivity) for one in entry.candidates]
        for entry in stats
    }

    def choose(bound: float) -> Choices:
        return {
            entry.layer.name: next(
                (
                    one.factors
                    for one, damage in zip(entry.candidates, damages[entry.layer.name], strict=True)
                    if damage <= bound
                ),
                None,
            )
            for entry in stats
        }

    bounds = sorted({damage for row in damages.values() for damage in row}, reverse=True)
    low, high = 0, len(bounds) - 1  # the largest bound costs least and fits: the caller has checked
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total_cost(stats, choose(bounds[middle])) <= available else (low, middle - 1)
    return spend_remainder(stats, choose(bounds[low]) if bounds else choose(0.0), available)


def allocate_knapsack(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Choices:
    """Minimise the summed damage: a multiple-choice knapsack (METHODS §4).

    Per layer: any efficient candidate, or dense at its full cost with no error. Candidates of equal damage leave
    some of the budget; that is spent at the end, so that the budget is met within one step.
    """
    from rankship_pipeline.ranks.knapsack import Option, solve_knapsack

    menus = [
        [
            *(
                Option(cost=one.cost, error=entry.predict_damage(one.error, choice.sensitivity))
                for one in entry.candidates
            ),
            Option(cost=entry.dense_cost, error=0.0),
        ]
        for entry in stats
    ]
    picked = solve_knapsack(menus, available)
    chosen = {
        entry.layer.name: [*(one.factors for one in entry.candidates), None][index]
        for entry, index in zip(stats, picked, strict=True)
    }
    return spend_remainder(stats, chosen, available)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": allocate_uniform,
    "arp": allocate_arp,
    "strs": allocate_strs,
    "knapsack": allocate_knapsack,
}


def _choose_within(stats: LayerStats, cost: float) -> Factors | None:
    """The best candidate that costs at most `cost`, at least the cheapest; None once dense is affordable."""
    if not stats.candidates or cost >= stats.dense_cost:
        return None
    affordable = [one for one in stats.candidates if one.cost <= cost]
    return (affordable[-1] if affordable else stats.candidates[0]).factors


def _threshold_rank(stats: LayerStats, threshold: float) -> Factors | None:
    total = float(stats.plain.sum())
    shares = np.cumsum(stats.plain) / total if total > 0 else np.ones(1)  # rank 1 already holds all of nothing
    rank = min(int(np.searchsorted(shares, threshold - 1e-12)) + 1, len(shares))
    return Factors(rank=rank) if stats.layer.count_factored(rank) < stats.layer.parameters else None


def _bisect(stats: Sequence[LayerStats], choose: Callable[[float], Choices], available: int) -> Choices:
    """The choice at the largest parameter in [0, 1] whose cost fits; costs must not fall as the parameter grows."""
    if total_cost(stats, choose(1.0)) <= available:
        return choose(1.0)
    low, high = 0.0, 1.0
    for _ in range(60):  # down to float resolution
        middle = (low + high) / 2
        if total_cost(stats, choose(middle)) <= available:
            low = middle
        else:
            high = middle
    return choose(low)


def spend_remainder(stats: Sequence[LayerStats], chosen: Choices, available: int) -> Choices:
    """Raise the relatively smallest affordable layers one candidate at a time (dense after the last)."""
    chosen = dict(chosen)
    left = available - total_cost(stats, chosen)
    while True:
        raises = []
        for entry in stats:
            current = chosen[entry.layer.name]
            if current is None:
                continue
            cost = entry.find_cost(current)
            larger = next((one for one in entry.candidates if one.cost > cost), None)
            extra = (larger.cost if larger else entry.dense_cost) - cost
            if extra <= left:
                raises.append((cost / entry.dense_cost, entry.layer.name, larger, extra))
        if not raises:
            return chosen
        _, name, larger, extra = min(raises, key=lambda candidate: candidate[:2])
        chosen[name] = larger.factors if larger else None
        left -= extra
