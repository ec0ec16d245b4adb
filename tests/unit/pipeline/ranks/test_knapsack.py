import itertools
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.ranks import knapsack
from rankship_pipeline.ranks.knapsack import Option, solve, solve_knapsack

SOLVER = 1e-9  # the absolute gap, relative to the largest error of one option
Menus = list[list[Option]]

close_errors = st.integers(0, 30).map(lambda steps: 1 + steps * 1e-8)
some_errors = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)


def draw_menus(
    costs: st.SearchStrategy[int], errors: st.SearchStrategy[float] = some_errors
) -> st.SearchStrategy[Menus]:
    menu = st.lists(st.builds(Option, cost=costs, error=errors), min_size=1, max_size=5)
    return st.lists(menu, min_size=1, max_size=4)


small_menus = draw_menus(st.integers(1, 50))
any_menus = (
    small_menus
    | draw_menus(st.integers(1, 10**14))
    | draw_menus(st.integers(0, 3), st.integers(0, 3).map(float))
    | draw_menus(st.integers(1, 50), close_errors)
    | draw_menus(st.integers(1, 50), st.floats(0, 1e-300) | st.floats(0, 1e9))
)
shares = st.floats(0, 1)


def find_limit(menus: Menus, share: float) -> int:
    """A feasible limit, from the cheapest plan (0) to the dearest (1)."""
    low = sum(min(o.cost for o in menu) for menu in menus)
    high = sum(max(o.cost for o in menu) for menu in menus)
    return low + int(share * (high - low))


def find_largest(menus: Menus) -> float:
    return max(o.error for menu in menus for o in menu)


def sum_plan(menus: Menus, picked: list[int]) -> tuple[int, float]:
    options = [menu[index] for menu, index in zip(menus, picked, strict=True)]
    return sum(o.cost for o in options), sum(o.error for o in options)


def try_everything(menus: Menus, limit: int) -> float:
    return min(
        sum(o.error for o in options) for options in itertools.product(*menus) if sum(o.cost for o in options) <= limit
    )


def make_layers(seed: int, count: int, side: int, step: int = 1) -> Menus:
    """Menus as rank allocation makes them: a falling spectrum's tail at k(m+n), and dense at mn with no error.

    The sides are odd and unlike, so that costs share no divisor. At the break-even rank much of the tail is left, so
    dense is a jump.
    """
    random = np.random.default_rng(seed)
    menus = []
    for _ in range(count):
        rows, columns = (int(n) * 2 + 1 for n in random.integers(side * 2 // 5, side * 3 // 5, 2))
        energy = (np.arange(min(rows, columns)) + random.uniform(1, 20)) ** -random.uniform(0.5, 2)
        tail = np.append(np.cumsum(energy[::-1])[::-1], 0) * random.lognormal() / energy.sum()
        ranks = [k for k in range(step, min(rows, columns), step) if k * (rows + columns) < rows * columns]
        menus.append([*(Option(k * (rows + columns), float(tail[k])) for k in ranks), Option(rows * columns, 0.0)])
    return menus


def solve_milp(menus: Menus, limit: int) -> float:
    """The least error as HiGHS finds it: the whole problem, nothing left out."""
    options = [option for menu in menus for option in menu]
    owners = [index for index, menu in enumerate(menus) for _ in menu]
    scale = 1e3 / find_largest(menus)  # HiGHS stops at an absolute gap of 1e-6
    result = milp(
        np.array([o.error for o in options]) * scale,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(csr_array((np.ones(len(options)), (owners, range(len(options))))), 1, 1),
            LinearConstraint(np.array([[float(o.cost) for o in options]]), -inf, limit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.status == 0, result.message
    return float(result.fun) / scale


def fill_table(menus: Menus, limit: int) -> float:
    """The least error by dynamic programming over every cost up to the limit."""
    best = np.zeros(limit + 1)  # best[b] = least error of the menus so far at a cost of at most b
    for menu in menus:
        following = np.full(limit + 1, inf)
        for option in menu:
            kept = best[: max(0, limit + 1 - option.cost)] + option.error
            following[option.cost :] = np.minimum(following[option.cost :], kept)
        best = following
    return float(best[limit])


# --- against oracles -----------------------------------------------------------------------------------------------


@given(small_menus, shares, st.sampled_from([1, 8, 10**6]))
def test_the_solver_agrees_with_trying_everything(menus: Menus, share: float, unit: int) -> None:
    menus = [[Option(cost=o.cost * unit, error=o.error) for o in menu] for menu in menus]
    limit = find_limit(menus, share)
    cost, error = sum_plan(menus, solve_knapsack(menus, limit))
    assert cost <= limit
    assert error == pytest.approx(try_everything(menus, limit), abs=SOLVER)


@given(any_menus, shares)
def test_the_bound_and_the_error_enclose_the_best_plan_closely(menus: Menus, share: float) -> None:
    limit = find_limit(menus, share)
    solution = solve(menus, limit)
    cost, error = sum_plan(menus, solution.picked)
    best, largest = try_everything(menus, limit), find_largest(menus)
    assert cost <= limit
    assert solution.error == pytest.approx(error, rel=1e-12)
    assert solution.bound <= best + 1e-12 * largest
    assert best <= solution.error + 1e-12 * largest
    assert solution.error - solution.bound <= SOLVER * largest


@given(any_menus, shares)
def test_a_search_cut_short_still_encloses_the_best_plan_more_closely_by_and_by(menus: Menus, share: float) -> None:
    limit = find_limit(menus, share)
    best, slack = try_everything(menus, limit), 1e-12 * find_largest(menus)
    below, above = -inf, inf
    for efforts in ((), (1,), (1, 1, 3), (1, 1, 3, 9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knapsack, "_EFFORTS", efforts)
            solution = solve(menus, limit)
        cost, error = sum_plan(menus, solution.picked)
        assert cost <= limit
        assert solution.error == pytest.approx(error, rel=1e-12)
        assert below - slack <= solution.bound <= best + slack
        assert best - slack <= solution.error <= above + slack
        below, above = solution.bound, solution.error


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_solver_agrees_with_highs_on_layers(seed: int, share: float) -> None:
    menus = make_layers(seed, 12, 80)
    limit = int(share * sum(menu[-1].cost for menu in menus))
    cost, error = sum_plan(menus, solve_knapsack(menus, limit))
    assert cost <= limit
    assert error == pytest.approx(solve_milp(menus, limit), abs=2 * SOLVER * find_largest(menus))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_solver_agrees_with_highs_on_costs_without_a_common_divisor(seed: int) -> None:
    random = np.random.default_rng(seed)
    menus = [
        [Option(int(c), float(e)) for c, e in zip(random.integers(1, 10**9, 20), random.uniform(0, 1, 20), strict=True)]
        for _ in range(15)
    ]
    limit = find_limit(menus, 0.1)
    cost, error = sum_plan(menus, solve_knapsack(menus, limit))
    assert cost <= limit
    assert error == pytest.approx(solve_milp(menus, limit), abs=2 * SOLVER)


@pytest.mark.parametrize("count", [20, 30, 40])
def test_the_solver_agrees_with_a_table_of_all_costs_on_many_menus(count: int) -> None:
    random = np.random.default_rng(count)
    menus = [[Option(int(cost), float(random.uniform())) for cost in random.integers(1, 60, 12)] for _ in range(count)]
    cost, error = sum_plan(menus, solve_knapsack(menus, 20 * count))
    assert cost <= 20 * count
    assert error == pytest.approx(fill_table(menus, 20 * count), abs=SOLVER)


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_solver_agrees_with_a_table_of_all_costs_on_many_layers(seed: int, share: float) -> None:
    """So many that the relaxation misses the best plan by very little, and the search has to be exact to tell."""
    menus = make_layers(seed, 60, 50)
    limit = int(share * sum(menu[-1].cost for menu in menus))
    cost, error = sum_plan(menus, solve_knapsack(menus, limit))
    assert cost <= limit
    assert error == pytest.approx(fill_table(menus, limit), abs=SOLVER * find_largest(menus))


@pytest.mark.parametrize(("count", "side", "step"), [(224, 1000, 1), (224, 1000, 8)])
def test_a_large_model_is_solved_to_the_end(count: int, side: int, step: int) -> None:
    menus = make_layers(0, count, side, step)
    limit = int(0.5 * sum(menu[-1].cost for menu in menus))
    solution = solve(menus, limit)
    assert sum_plan(menus, solution.picked)[0] <= limit
    assert solution.error - solution.bound <= SOLVER * find_largest(menus)
    assert solve(menus, limit) == solution


# --- cases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "unit"), [(0, 1), (1, 1e-8), (0, 1e-300)])
def test_the_solver_finds_what_greedy_and_lagrange_miss(offset: float, unit: float) -> None:
    """The best error per cost (menu 1) leaves no room for the two that together are better."""
    whole = [[(1, 10), (7, 3)], [(1, 6), (6, 2)], [(1, 6), (6, 2)]]
    menus = [[Option(cost, offset + error * unit) for cost, error in menu] for menu in whole]
    assert solve_knapsack(menus, 13) == [0, 1, 1]


def test_a_single_unit_of_cost_decides() -> None:
    menus = [[Option(1_000_003, 1.0), Option(2_000_006, 0.0)], [Option(1_000_033, 1.0), Option(2_000_066, 0.5)]]
    assert solve_knapsack(menus, 3_000_039) == [1, 0]
    assert solve_knapsack(menus, 3_000_038) == [0, 0]


def test_ranks_behind_the_jump_to_dense_are_used_where_dense_does_not_fit() -> None:
    """Both hulls run from the first option straight to dense; the two that lie above them fill the budget."""
    menu = [Option(10, 1.0), Option(20, 0.95), Option(30, 0.9), Option(40, 0.0)]
    assert solve_knapsack([menu, menu], 79) in ([2, 3], [3, 2])
    assert solve_knapsack([menu, menu], 69) in ([1, 3], [3, 1])
    assert solve_knapsack([menu, menu], 49) in ([1, 1], [0, 2], [2, 0])
    assert solve([menu, menu], 49).error == pytest.approx(1.9)


def test_dominated_options_are_never_picked() -> None:
    menu = [Option(5, 0.5), Option(3, 0.5), Option(4, 0.7), Option(9, 0.5), Option(3, 0.9)]
    for limit in (3, 4, 9, 100):
        assert solve_knapsack([menu], limit) == [1]


def test_of_twins_the_first_is_picked() -> None:
    assert solve_knapsack([[Option(4, 1.0), Option(2, 1.0), Option(2, 1.0), Option(4, 1.0)]], 9) == [1]


def test_equal_menus_share_evenly_what_helps_all_alike() -> None:
    menus = [[Option(k, 2.0**-k) for k in range(1, 12)]] * 50
    assert solve_knapsack(menus, 250) == [4] * 50


def test_without_errors_the_cheapest_options_do() -> None:
    menu = [Option(7, 0.0), Option(5, 0.0), Option(6, 0.0)]
    for limit in (15, 16, 99):
        solution = solve([menu] * 3, limit)
        assert (solution.picked, solution.error, solution.bound) == ([1, 1, 1], 0, 0)


def test_menus_of_one_option_leave_no_choice() -> None:
    solution = solve([[Option(5, 0.25)], [Option(6, 0.5)]], 11)
    assert (solution.picked, solution.error, solution.bound) == ([0, 0], 0.75, 0.75)


def test_a_limit_beyond_every_plan_takes_the_least_errors() -> None:
    assert solve_knapsack([[Option(1, 1.0), Option(3, 0.0), Option(2, 0.5)]] * 2, 10**30) == [1, 1]


def test_options_beyond_the_limit_may_cost_anything() -> None:
    assert solve_knapsack([[Option(1, 1.0), Option(10**30, 0.0), Option(2, 0.5)]] * 2, 3) in ([0, 2], [2, 0])


def test_costs_that_floats_cannot_tell_apart_are_a_build_error() -> None:
    with pytest.raises(BuildError, match="2\\^53"):
        solve([[Option(1, 1.0), Option(2**54, 0.0)]], 2**54)


def test_no_menus_need_no_choice() -> None:
    assert solve_knapsack([], 0) == []


def test_a_limit_below_every_choice_is_a_build_error() -> None:
    with pytest.raises(BuildError, match="no solution: the cheapest options cost 10, the limit is 9"):
        solve_knapsack([[Option(5, 1.0), Option(6, 0.0)], [Option(5, 1.0)]], 9)
