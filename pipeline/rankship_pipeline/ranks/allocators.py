"""Rank allocators: they choose how each layer is stored, so that the whole model meets a budget exactly."""

from collections.abc import Callable, Sequence

import numpy as np

from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.ranks.stats import Choices, LayerStats
from rankship_pipeline.recipe.choices import RankChoice

Allocator = Callable[[Sequence[LayerStats], int, RankChoice], Choices]


def total_cost(stats: Sequence[LayerStats], chosen: Choices) -> int:
    """The cost of all factorable layers under a choice."""
    return sum(entry.find_cost(chosen[entry.layer.name]) for entry in stats)


def allocate_uniform(stats: Sequence[LayerStats], available: int, _choice: RankChoice) -> Choices:
    """Give every layer the same share of its full cost, the largest that fits; then spend the rest.

    Each layer takes its best candidate within the share, and stays dense at a share of one. The remainder goes, one
    candidate at a time, to the layers with the smallest share, so that the budget is met within one step.
    """

    def choose(share: float) -> Choices:
        return {entry.layer.name: _choose_within(entry, share * entry.full_cost) for entry in stats}

    return spend_remainder(stats, _bisect(stats, choose, available), available)


def allocate_arp(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Choices:
    """ARP's variance threshold on the merged weight: k = min{k : Σ_{i≤k} σ_i² ≥ τ Σ σ_i²}.

    Layers are factored only if k(m+n) < mn. τ is the recipe's, or the largest that meets the budget, by bisection.
    Ranks are not rounded to a step.
    """

    def choose(threshold: float) -> Choices:
        return {entry.layer.name: _threshold_rank(entry, threshold) for entry in stats}

    return choose(choice.threshold) if choice.threshold is not None else _bisect(stats, choose, available)


def allocate_strs(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Choices:
    """Sensitivity-based truncation rank searching (ASVD, arXiv 2312.05821 §3.3): one bound on the damage of any layer.

    Every layer is measured alone at a grid of sizes; each then takes its cheapest candidate whose damage stays under
    one common bound, the smallest bound that fits. ASVD measures perplexity, this the divergence from the dense model.
    """
    damages = {
        entry.layer.name: [entry.predict_damage(one.error, choice.sensitivity) for one in entry.candidates]
        for entry in stats
    }

    def choose(bound: float) -> Choices:
        return {
            entry.layer.name: next(
                (
                    one.stored
                    for one, damage in zip(entry.candidates, damages[entry.layer.name], strict=True)
                    if damage <= bound
                ),
                entry.full,
            )
            for entry in stats
        }

    bounds = sorted({damage for row in damages.values() for damage in row}, reverse=True)
    low, high = 0, len(bounds) - 1  # the largest bound costs least and fits: check_feasible ran before
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if total_cost(stats, choose(bounds[middle])) <= available else (low, middle - 1)
    return spend_remainder(stats, choose(bounds[low]) if bounds else choose(0.0), available)


def allocate_knapsack(stats: Sequence[LayerStats], available: int, choice: RankChoice) -> Choices:
    """Minimise the summed damage: a multiple-choice knapsack.

    Per layer: any efficient candidate, of any form, rank and type, or its most exact way at full cost. Layers that may
    lose neurons together have one menu (see menus.py). Candidates of equal damage may leave a part of the budget; it is
    spent at the end, so that the budget is met within one step.
    """
    from rankship_pipeline.ranks.knapsack import Option, solve_knapsack
    from rankship_pipeline.ranks.menus import list_menus

    menus = list_menus(stats, choice.sensitivity)
    picked = solve_knapsack([[Option(cost=one.cost, error=one.error) for one in menu] for menu in menus], available)
    ways = {name: way for menu, at in zip(menus, picked, strict=True) for name, way in menu[at].list_ways()}
    chosen = {entry.layer.name: ways[entry.layer.name] for entry in stats}
    return spend_remainder(stats, chosen, available)


ALLOCATORS: dict[str, Allocator] = {
    "uniform": allocate_uniform,
    "arp": allocate_arp,
    "strs": allocate_strs,
    "knapsack": allocate_knapsack,
}


def _choose_within(stats: LayerStats, cost: float) -> Stored:
    """The best candidate that costs at most `cost`, at least the cheapest; the most exact way if that is affordable."""
    if not stats.candidates or cost >= stats.full_cost:
        return stats.full
    affordable = [one for one in stats.candidates if one.cost <= cost]
    return (affordable[-1] if affordable else stats.candidates[0]).stored


def _threshold_rank(stats: LayerStats, threshold: float) -> Stored:
    total = float(stats.plain.sum())
    shares = np.cumsum(stats.plain) / total if total > 0 else np.ones(1)  # all zero: rank 1 suffices
    rank = min(int(np.searchsorted(shares, threshold - 1e-12)) + 1, len(shares))
    return Stored(factors=Factors(rank=rank) if stats.layer.count_factored(rank) < stats.layer.parameters else None)


def _bisect(stats: Sequence[LayerStats], choose: Callable[[float], Choices], available: int) -> Choices:
    """The choice at the largest parameter in [0, 1] whose cost fits; costs must not decrease with the parameter."""
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
    """Raise layers by one affordable candidate at a time (full cost after the last), smallest share of it first.

    Layers that lost neurons stay as they are.
    """
    chosen = dict(chosen)
    left = available - total_cost(stats, chosen)
    while True:
        raises = []
        for entry in stats:
            current = chosen[entry.layer.name]
            if current == entry.full or (current.factors is not None and current.factors.form == "width"):
                continue
            cost = entry.find_cost(current)
            larger = next((one.stored for one in entry.candidates if one.cost > cost), entry.full)
            extra = entry.find_cost(larger) - cost
            if extra <= left:
                raises.append((cost / entry.full_cost, entry.layer.name, larger, extra))
        if not raises:
            return chosen
        _, name, larger, extra = min(raises, key=lambda candidate: candidate[:2])
        chosen[name] = larger
        left -= extra
