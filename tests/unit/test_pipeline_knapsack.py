import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.errors import BuildError
from rankship_pipeline.knapsack import Option, solve_knapsack

SOLVER = 1e-9  # the absolute gap, relative to the largest error of one option

menus = st.lists(
    st.lists(
        st.builds(Option, cost=st.integers(1, 50), error=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=4,
)


@given(menus, st.floats(0, 1), st.sampled_from([1, 8, 10**6]))
def test_the_solver_agrees_with_trying_everything(menus: list[list[Option]], share: float, unit: int) -> None:
    menus = [[Option(cost=o.cost * unit, error=o.error) for o in menu] for menu in menus]
    low = sum(min(o.cost for o in menu) for menu in menus)
    high = sum(max(o.cost for o in menu) for menu in menus)
    limit = low + int(share * (high - low))
    picked = [menu[index] for menu, index in zip(menus, solve_knapsack(menus, limit), strict=True)]
    assert sum(option.cost for option in picked) <= limit
    best = min(
        sum(o.error for o in options) for options in itertools.product(*menus) if sum(o.cost for o in options) <= limit
    )
    assert sum(option.error for option in picked) == pytest.approx(best, abs=SOLVER)


def test_the_solver_agrees_with_dynamic_programming_on_many_menus() -> None:
    random = np.random.default_rng(0)
    for count in (20, 30, 40):
        menus = [
            [Option(int(cost), float(random.uniform())) for cost in random.integers(1, 60, 12)] for _ in range(count)
        ]
        limit = 20 * count
        best = np.zeros(limit + 1)  # best[b] = least error of the menus so far at a cost of at most b
        for menu in menus:
            following = np.full(limit + 1, np.inf)
            for option in menu:
                kept = best[: limit + 1 - option.cost] + option.error
                following[option.cost :] = np.minimum(following[option.cost :], kept)
            best = following
        picked = [menu[index] for menu, index in zip(menus, solve_knapsack(menus, limit), strict=True)]
        assert sum(option.cost for option in picked) <= limit
        assert sum(option.error for option in picked) == pytest.approx(best[limit], abs=SOLVER)


def test_the_solver_finds_what_greedy_and_lagrange_miss() -> None:
    """The best error per cost (menu 1) leaves no room for the two that together are better."""
    menus = [[Option(1, 10), Option(7, 3)], [Option(1, 6), Option(6, 2)], [Option(1, 6), Option(6, 2)]]
    assert solve_knapsack(menus, 13) == [0, 1, 1]


def test_a_single_unit_of_cost_decides() -> None:
    menus = [[Option(1_000_003, 1.0), Option(2_000_006, 0.0)], [Option(1_000_033, 1.0), Option(2_000_066, 0.5)]]
    assert solve_knapsack(menus, 3_000_039) == [1, 0]
    assert solve_knapsack(menus, 3_000_038) == [0, 0]


def test_dominated_options_are_never_picked() -> None:
    menu = [Option(5, 0.5), Option(3, 0.5), Option(4, 0.7), Option(9, 0.5), Option(3, 0.9)]
    for limit in (3, 4, 9, 100):
        assert solve_knapsack([menu], limit) == [1]


def test_no_menus_need_no_choice() -> None:
    assert solve_knapsack([], 0) == []


def test_a_limit_below_every_choice_is_a_build_error() -> None:
    with pytest.raises(BuildError, match="no solution"):
        solve_knapsack([[Option(5, 1.0)], [Option(5, 1.0)]], 9)
