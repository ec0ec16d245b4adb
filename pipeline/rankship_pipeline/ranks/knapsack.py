"""Solves the multiple-choice knapsack: one option per menu, smallest total error within a cost limit.

After Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11, and Pisinger, "A minimal algorithm for
the multiple-choice knapsack problem" (1995): the linear relaxation, by a greedy walk along the menus' convex hulls;
Lagrangian bounds that remove options; dynamic programming over the remaining options, with bounds. Two things differ:
the menus to come are bounded by their own relaxation, and the menus with the largest jumps in cost come first. Once
these (a last rank to dense) are decided, the relaxation of the rest is nearly exact, and few partial plans remain.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum, inf

import numpy as np
from numpy.typing import NDArray

from rankship_pipeline.foundation.errors import BuildError

_TOLERANCE = 1e-9  # of the largest error
_EFFORTS = (1_000, 5_000, 25_000, 125_000, 625_000)  # partial plans per menu; no time limit, so that plans reproduce

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Trail = list[tuple[NDArray[np.int32], int]]  # by menu: indices kept of options × partial plans, and the number of plans


@dataclass(frozen=True)
class Option:
    """One choice for one layer: its cost (any integer unit) and its error."""

    cost: int
    error: float


@dataclass(frozen=True)
class Solution:
    """Each menu's chosen index, their summed error, and a lower bound on the error of every plan within the limit."""

    picked: list[int]
    error: float
    bound: float


@dataclass(frozen=True)
class _Menu:
    """The undominated options, by rising cost and falling error, and the corners of their lower convex hull.

    `indexes` are the caller's; `costs` count from the caller's cheapest option; `errors` are shares of the largest of
    all; `slopes` are the error that each edge of the hull saves per unit of cost, strictly falling.
    """

    indexes: Integers
    costs: Integers
    errors: Floats
    corners: Integers
    slopes: Floats


def solve_knapsack(menus: Sequence[Sequence[Option]], limit: int) -> list[int]:
    """Pick one option per menu minimising Σ error subject to Σ cost ≤ limit; returns each menu's chosen index."""
    return solve(menus, limit).picked


def solve(menus: Sequence[Sequence[Option]], limit: int) -> Solution:
    """Solve to within 1e-9 of the largest error, or as far as bounded effort allows; `error - bound` limits the gap."""
    least = sum(min(option.cost for option in menu) for menu in menus)
    room = min(limit, sum(max(option.cost for option in menu) for menu in menus)) - least
    if room < 0:
        raise BuildError(
            f"the rank allocation has no solution: the cheapest options cost {least:,}, the limit is {limit:,}",
            hint="raise the budget",
        )
    if not menus:
        return Solution([], 0.0, 0.0)
    if room >= 2**53:  # not exact as floats
        raise BuildError(f"the options' costs span {room:,}, 2^53 or more", hint="count costs in a coarser unit")
    scale = max(option.error for menu in menus for option in menu) or 1.0
    tables = [_read_menu(menu, room, scale) for menu in menus]
    picked, multiplier = _relax(tables, room)
    relaxed = fsum((table.errors + multiplier * table.costs).min() for table in tables) - multiplier * room
    error, bound = _sum_errors(menus, picked) / scale, relaxed
    for effort in _EFFORTS:
        if error - bound <= _TOLERANCE:
            break
        found, reached = _search([_reduce(table, multiplier, error - relaxed) for table in tables], room, error, effort)
        picked, bound = found or picked, max(bound, reached)
        error = _sum_errors(menus, picked) / scale
    return Solution(picked, _sum_errors(menus, picked), min(error, bound) * scale)


def _sum_errors(menus: Sequence[Sequence[Option]], picked: Sequence[int]) -> float:
    return fsum(menu[index].error for menu, index in zip(menus, picked, strict=True))


def _read_menu(menu: Sequence[Option], room: int, scale: float) -> _Menu:
    """The affordable options with a smaller error than every cheaper one."""
    least = min(option.cost for option in menu)
    costs = np.array([min(option.cost - least, room + 1) for option in menu], np.int64)
    errors = np.array([option.error / scale for option in menu])
    kept = _find_undominated(costs, errors)
    kept = kept[costs[kept] <= room]
    return _make_menu(kept, costs[kept], errors[kept])


def _make_menu(indexes: Integers, costs: Integers, errors: Floats) -> _Menu:
    """Find the hull by a monotone chain, comparing the slopes that are sorted later, so that rounding reorders none."""
    cost, error = costs.tolist(), errors.tolist()
    corners, slopes = [0], [inf]
    for right in range(1, len(cost)):
        while (slope := (error[corners[-1]] - error[right]) / (cost[right] - cost[corners[-1]])) >= slopes[-1]:
            corners.pop()
            slopes.pop()
        corners.append(right)
        slopes.append(slope)
    return _Menu(indexes, costs, errors, np.array(corners), np.array(slopes[1:]))


def _sort_edges(tables: Sequence[_Menu]) -> tuple[Integers, Integers, Floats]:
    """The edges of all hulls, best first: each edge's menu, its cost and the error it saves."""
    order = np.argsort(-np.concatenate([table.slopes for table in tables]), kind="stable")
    owners = np.repeat(np.arange(len(tables)), [len(table.slopes) for table in tables])
    costs = np.concatenate([np.diff(table.costs[table.corners]) for table in tables])
    savings = np.concatenate([-np.diff(table.errors[table.corners]) for table in tables])
    return owners[order], costs[order], savings[order]


def _relax(tables: Sequence[_Menu], room: int) -> tuple[list[int], float]:
    """The plan at which the best edges stop fitting, and the multiplier: the next edge's saving per unit of cost."""
    owners, costs, savings = _sort_edges(tables)
    fitting = int(np.searchsorted(np.cumsum(costs), room, side="right"))
    multiplier = float(savings[fitting] / costs[fitting]) if fitting < len(costs) else 0.0
    return _recall(tables, [], 0, np.bincount(owners[:fitting], minlength=len(tables))), multiplier


def _reduce(table: _Menu, multiplier: float, gap: float) -> _Menu:
    """Drop the options whose reduced cost exceeds the gap: no plan better than the current one has them."""
    reduced = table.errors + multiplier * table.costs
    kept = reduced - reduced.min() <= gap
    return _make_menu(table.indexes[kept], table.costs[kept], table.errors[kept])


@dataclass(frozen=True)
class _Partials:
    """Plans for the menus so far: each plan's cost and error."""

    costs: Integers
    errors: Floats


@dataclass(frozen=True)
class _Rest:
    """The relaxation of the menus to come, from their cheapest options along the best edges of their hulls.

    `budgets` rise and `errors` fall from one edge to the next; `owners` are the menus whose edges these are.
    """

    owners: Integers
    budgets: Integers
    errors: Floats

    def bound(self, room: Integers) -> Floats:
        """A lower bound on the error of any choice from these menus within `room`; infinite if none fits."""
        return np.interp(room, self.budgets, self.errors, left=inf)

    def count_edges(self, room: Integers) -> Integers:
        """The number of edges that fit completely; with only these, the relaxation is a valid choice."""
        return np.searchsorted(self.budgets, room, side="right") - 1


def _search(tables: Sequence[_Menu], room: int, error: float, effort: int) -> tuple[list[int], float]:
    """Dynamic programming over partial plans: a plan with less than `error`, empty if none is found, and a lower bound.

    A partial plan is dropped when another one costs no more and has no larger error, or when its error with the
    relaxation of the menus to come is not below the best known plan. Rounding that relaxation down gives a whole plan,
    so that good plans are known early. Beyond `effort`, the least promising are dropped too; the bound accounts for
    them. Menus are sorted by the longest edge of their hulls, longest first, after menus without a choice.
    """
    order = sorted(range(len(tables)), key=lambda i: -max(np.diff(tables[i].costs[tables[i].corners]), default=inf))
    stages = [tables[i] for i in order]
    partials, lost = _Partials(np.zeros(1, np.int64), np.zeros(1)), inf
    trail: Trail = []
    plan: list[int] = []
    for (table, following), rest in zip(pairwise([*stages, stages[-1]]), _relax_rests(stages), strict=True):
        tried = _extend(partials, table)
        bounds = tried.errors + rest.bound(room - tried.costs)
        kept = np.flatnonzero(bounds < error - _TOLERANCE / 2)
        if not len(kept):
            break
        kept = kept[_find_undominated(tried.costs[kept], tried.errors[kept])]
        kept, dropped = _keep_promising(kept, bounds, max(1, effort // len(following.costs)))
        lost = min(lost, dropped)
        trail.append((kept.astype(np.int32), len(partials.costs)))
        partials = _Partials(tried.costs[kept], tried.errors[kept])
        row, edges, total = _complete(partials, rest, room)
        if total < error:
            error = total
            plan = _recall(stages, trail, row, np.bincount(rest.owners[:edges], minlength=len(stages)))
    return [index for _, index in sorted(zip(order, plan, strict=False))], min(lost, error - _TOLERANCE / 2)


def _relax_rests(stages: Sequence[_Menu]) -> Iterator[_Rest]:
    """For every stage the relaxation of the stages after it."""
    owners, edge_costs, savings = _sort_edges(stages)
    first_costs = np.array([table.costs[0] for table in stages])
    first_errors = np.array([table.errors[0] for table in stages])
    for stage in range(len(stages)):
        coming = owners > stage
        budgets = np.cumsum(np.append(first_costs[stage + 1 :].sum(), edge_costs[coming]))
        errors = np.cumsum(np.append(first_errors[stage + 1 :].sum(), -savings[coming]))
        yield _Rest(owners[coming], budgets, errors)


def _extend(partials: _Partials, table: _Menu) -> _Partials:
    """Every partial plan with every option of one more menu, option by option."""
    return _Partials(
        (table.costs[:, None] + partials.costs).ravel(),
        (table.errors[:, None] + partials.errors).ravel(),
    )


def _keep_promising(kept: Integers, bounds: Floats, width: int) -> tuple[Integers, float]:
    """At most `width` of the `kept` plans, those with the lowest bounds, and the lowest bound of the dropped ones."""
    if len(kept) <= width:
        return kept, inf
    ranked = np.argpartition(bounds[kept], width)
    return kept[np.sort(ranked[:width])], float(bounds[kept[ranked[width:]]].min())


def _complete(partials: _Partials, rest: _Rest, room: int) -> tuple[int, int, float]:
    """The partial plan with the best whole plan when the rest is rounded down: its row, edges and total error."""
    edges = rest.count_edges(room - partials.costs)
    totals = partials.errors + rest.errors[edges]
    row = int(totals.argmin())
    return row, int(edges[row]), float(totals[row])


def _recall(stages: Sequence[_Menu], trail: Trail, row: int, corners: Integers) -> list[int]:
    """The whole plan: the trail's options for the menus done so far, and the given hull corners for the rest."""
    plan = [int(table.indexes[table.corners[corner]]) for table, corner in zip(stages, corners, strict=True)]
    for stage, (kept, count) in reversed([*enumerate(trail)]):
        option, row = divmod(int(kept[row]), count)
        plan[stage] = int(stages[stage].indexes[option])
    return plan


def _find_undominated(costs: Integers, errors: Floats) -> Integers:
    """Positions by strictly rising cost and strictly falling error, the first of equals; fast on a few sorted runs."""
    order = np.argsort(costs, kind="stable")
    falling = errors[order]
    order = order[np.append(True, falling[1:] < np.minimum.accumulate(falling)[:-1])]
    return np.asarray(order[np.append(np.diff(costs[order]) > 0, True)], np.int64)  # of equal costs the last, the best
