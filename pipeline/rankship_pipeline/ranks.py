"""Rank allocation: which layer gets which rank, so that the whole model meets a parameter budget exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.errors import BudgetInfeasible
from rankship_pipeline.layers import Layer
from rankship_pipeline.recipe import Budget, RankChoice
from rankship_pipeline.records import LayerRank, RankPlan

Ranks = dict[str, int | None]


@dataclass(frozen=True)
class LayerStats:
    """What allocation knows of one layer: σ² of its weight (`plain`) and of the whitened weight (`energy`), falling."""

    layer: Layer
    plain: NDArray[np.float64]
    energy: NDArray[np.float64]
    interference: float | None = None

    def predict_error(self, rank: int | None) -> float:
        """Share of the output energy lost at `rank`: Σ_{j>k} σ_j² / Σ σ_j²; 0 when dense."""
        total = float(self.energy.sum())
        if rank is None or total == 0:
            return 0.0
        return float(self.energy[rank:].sum()) / total

    def list_ranks(self, step: int) -> list[int]:
        """Multiples of `step` that are cheaper than dense, ascending; empty where the layer can only stay dense."""
        limit = min(self.layer.rows, self.layer.columns)
        return [k for k in range(step, limit + 1, step) if self.layer.count_factored(k) < self.layer.parameters]


Allocator = Callable[[Sequence[LayerStats], int, RankChoice], Ranks]


def resolve_budget(budget: Budget, merged_parameters: int) -> int:
    """The budget as a number of parameters of the whole model; bytes count 4 per float32 parameter."""
    if budget.kept_parameters is not None:
        return int(Fraction(str(budget.kept_parameters)) * merged_parameters)  # 0.7 of 350 is 245, not 244.999…
    if budget.parameters is not None:
        return budget.parameters
    return int(budget.size_bytes or 0) // 4


def find_step(method: str, choice: RankChoice) -> int:
    """The rank step that a method keeps to: ARP's ranks are its own, down to 1."""
    return 1 if method == "arp" else choice.step


def check_feasible(layers: Sequence[Layer], fixed: int, budget: int, step: int) -> None:
    """Raise BudgetInfeasible, naming the smallest budget that works, before any long work starts."""
    smallest = fixed + sum(min(layer.parameters, layer.count_factored(step)) for layer in layers)
    if budget < smallest:
        total = fixed + sum(layer.parameters for layer in layers)
        raise BudgetInfeasible(
            f"the budget is {budget:,} parameters, the smallest model at rank step {step} has {smallest:,}"
            f" ({smallest / total:.3f} of the dense {total:,}; {fixed:,} lie outside the factorable layers)",
            hint=f"raise the budget to kept_parameters = {ceil(smallest / total * 1000) / 1000}, or lower ranks.step",
        )


def allocate(
    method: str, stats: Sequence[LayerStats], fixed_parameters: int, budget_parameters: int, choice: RankChoice
) -> RankPlan:
    """Choose a rank or dense for every layer; the plan's total never exceeds the budget.

    `fixed_parameters` are those outside the factorable layers. With ARP's fixed threshold the budget is what comes out.
    """
    if choice.threshold is None:
        check_feasible([entry.layer for entry in stats], fixed_parameters, budget_parameters, find_step(method, choice))
    ranks = ALLOCATORS[method](stats, budget_parameters - fixed_parameters, choice)
    layers = tuple(_describe(entry, ranks[entry.layer.name]) for entry in stats)
    total = fixed_parameters + sum(layer.chosen_parameters for layer in layers)
    return RankPlan(
        method=method,
        layers=layers,
        fixed_parameters=fixed_parameters,
        total_parameters=total,
        budget_parameters=budget_parameters if choice.threshold is None else total,
        predicted_error=sum(layer.relative_error for layer in layers),
    )


def _describe(stats: LayerStats, rank: int | None) -> LayerRank:
    layer = stats.layer
    return LayerRank(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        rank=rank,
        dense_parameters=layer.parameters,
        chosen_parameters=_cost(layer, rank),
        relative_error=stats.predict_error(rank),
        interference=stats.interference,
    )


def _cost(layer: Layer, rank: int | None) -> int:
    return layer.parameters if rank is None else layer.count_factored(rank)


def total_cost(stats: Sequence[LayerStats], ranks: Ranks) -> int:
    """Parameters of the factorable layers under a choice of ranks."""
    return sum(_cost(entry.layer, ranks[entry.layer.name]) for entry in stats)


def allocate_uniform(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Ranks:
    """One share of the break-even rank mn/(m+n) for every layer, the largest share that fits; then spend the rest.

    A layer whose share reaches its dense cost stays dense. The remainder goes, one step at a time, to the layers with
    the smallest share, so that the budget is met within one step.
    """

    def choose(share: float) -> Ranks:
        return {entry.layer.name: _floor_rank(entry, share * entry.layer.parameters, choice.step) for entry in stats}

    return _spend_remainder(stats, _bisect(stats, choose, available), available, choice.step)


def allocate_arp(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Ranks:
    """ARP's variance threshold on the merged weight (METHODS §1): k = min{k : Σ_{i≤k} σ_i² ≥ τ Σ σ_i²}.

    Factored only where k(m+n) < mn. τ is the recipe's, or the largest that meets the budget, by bisection. Ranks are
    ARP's own, not rounded to a step.
    """

    def choose(threshold: float) -> Ranks:
        return {entry.layer.name: _threshold_rank(entry, threshold) for entry in stats}

    return choose(choice.threshold) if choice.threshold is not None else _bisect(stats, choose, available)


def allocate_knapsack(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Ranks:
    """Minimise the summed relative error: a multiple-choice knapsack (METHODS §4).

    Per layer: a multiple of the step that is cheaper than dense, or dense at its full cost with no error. What the
    solver's tolerance leaves unspent is spent at the end, so that the budget is met within one step.
    """
    from rankship_pipeline.knapsack import Option, solve_knapsack

    menus = [
        [
            *(
                Option(cost=entry.layer.count_factored(k), error=entry.predict_error(k))
                for k in entry.list_ranks(choice.step)
            ),
            Option(cost=entry.layer.parameters, error=0.0),
        ]
        for entry in stats
    ]
    chosen = solve_knapsack(menus, available)
    ranks = {
        entry.layer.name: [*entry.list_ranks(choice.step), None][index]
        for entry, index in zip(stats, chosen, strict=True)
    }
    return _spend_remainder(stats, ranks, available, choice.step)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": allocate_uniform,
    "arp": allocate_arp,
    "knapsack": allocate_knapsack,
}


def _floor_rank(stats: LayerStats, cost: float, step: int) -> int | None:
    """The largest listed rank that costs at most `cost`, at least the smallest; None once dense is affordable."""
    ranks = stats.list_ranks(step)
    if not ranks or cost >= stats.layer.parameters:
        return None
    affordable = [k for k in ranks if stats.layer.count_factored(k) <= cost]
    return affordable[-1] if affordable else ranks[0]


def _threshold_rank(stats: LayerStats, threshold: float) -> int | None:
    total = float(stats.plain.sum())
    shares = np.cumsum(stats.plain) / total if total > 0 else np.ones(1)  # rank 1 already holds all of nothing
    rank = min(int(np.searchsorted(shares, threshold - 1e-12)) + 1, len(shares))
    return rank if stats.layer.count_factored(rank) < stats.layer.parameters else None


def _bisect(stats: Sequence[LayerStats], choose: Callable[[float], Ranks], available: int) -> Ranks:
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


def _spend_remainder(stats: Sequence[LayerStats], ranks: Ranks, available: int, step: int) -> Ranks:
    """Raise the relatively smallest affordable layers step by step (dense after the last) while the budget lasts."""
    ranks = dict(ranks)
    while True:
        left = available - total_cost(stats, ranks)
        raises = []
        for entry in stats:
            current = ranks[entry.layer.name]
            larger = [k for k in entry.list_ranks(step) if current is not None and k > current]
            following = larger[0] if larger else None
            extra = _cost(entry.layer, following) - _cost(entry.layer, current)
            if current is not None and extra <= left:
                raises.append((_cost(entry.layer, current) / entry.layer.parameters, entry.layer.name, following))
        if not raises:
            return ranks
        _, name, following = min(raises, key=lambda candidate: candidate[:2])
        ranks[name] = following
