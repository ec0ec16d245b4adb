"""Steps in a history: found soon, placed rightly, never unsaid, rarely false; odd nights and gaps are no steps."""

from math import exp, log

import numpy as np
import pytest
from numpy.typing import NDArray

from rankship_benchmarks.stats.steps import AlarmRule, Night, Step, find_steps


def make_nights(levels: NDArray[np.float64], canary: NDArray[np.float64] | None = None) -> list[Night]:
    """One night for each log level, with three rounds around it."""
    spread = (-0.004, 0.0, 0.004)
    return [
        Night(
            run_id=f"night {place}",
            started_utc=f"2025-01-{place:03}",
            rounds_ns=tuple(1e6 * exp(level + part) for part in spread),
            canary_ns=() if canary is None else tuple(2e5 * exp(canary[place] + part) for part in spread),
        )
        for place, level in enumerate(levels)
    ]


def draw(seed: int, nights: int, spread: float = 0.006) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, spread, nights)


def name(steps: tuple[Step, ...]) -> list[tuple[str, str]]:
    return [(step.run_id, step.verdict) for step in steps]


def test_a_step_is_told_within_days_at_its_place_and_size() -> None:
    levels = draw(1, 40)
    levels[25:] += log(1.04)
    (step,) = find_steps(make_nights(levels))
    assert (step.run_id, step.verdict) == ("night 25", "worse")
    assert int(step.found_run_id.split()[1]) <= 28
    assert step.ratio.low is not None
    assert step.ratio.high is not None
    assert step.ratio.low <= 1.04 <= step.ratio.high


def test_a_history_with_two_steps_has_three_levels() -> None:
    levels = draw(2, 60)
    levels[20:40] += log(1.06)
    assert name(find_steps(make_nights(levels))) == [("night 20", "worse"), ("night 40", "better")]


def test_what_was_told_stays_told() -> None:
    levels = draw(3, 60)
    levels[20:45] += log(1.05)
    whole = find_steps(make_nights(levels))
    assert len(whole) == 2
    for length in range(1, 60, 3):
        part = find_steps(make_nights(levels[:length]))
        assert [(one.run_id, one.found_run_id) for one in part] == [
            (one.run_id, one.found_run_id) for one in whole[: len(part)]
        ]


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_one_odd_night_is_no_step_and_hides_none(factor: float) -> None:
    levels = draw(4, 40)
    levels[[10, 18]] += log(factor)
    assert find_steps(make_nights(levels)) == ()
    levels[25:] += log(1.05)
    assert name(find_steps(make_nights(levels))) == [("night 25", "worse")]


def test_nights_that_do_not_count_are_gaps() -> None:
    levels = draw(5, 40)
    levels[25:] += log(1.05)
    nights = make_nights(levels)
    for place in (24, 25, 26, 30):
        slow = Night(run_id="gap", started_utc="x", rounds_ns=(9e9,), gap="throttled")
        nights[place] = slow if place % 2 else Night(run_id="gap", started_utc="x", rounds_ns=())
    assert name(find_steps(nights)) == [("night 27", "worse")]


def test_too_short_a_history_tells_nothing() -> None:
    levels = draw(6, 6)
    levels[4:] += log(2)
    assert find_steps(make_nights(levels)) == ()
    assert find_steps([]) == ()


def test_what_moves_the_canary_too_is_no_step() -> None:
    levels, canary = draw(7, 40), draw(8, 40)
    both = np.where(np.arange(40) >= 20, log(1.08), 0)
    assert len(find_steps(make_nights(levels + both))) == 1
    assert find_steps(make_nights(levels + both, canary + both)) == ()


def test_a_step_below_half_the_effect_is_none_however_sure() -> None:
    levels = draw(9, 60, spread=0.0005)
    levels[30:] += log(1.01)
    assert find_steps(make_nights(levels)) == ()
    assert name(find_steps(make_nights(levels), AlarmRule(effect=0.01))) == [("night 30", "worse")]


def test_a_silent_machine_that_steps_is_seen() -> None:
    levels = np.where(np.arange(20) >= 12, log(1.1), 0.0)
    assert name(find_steps(make_nights(levels))) == [("night 12", "worse")]


def test_false_alarms_stay_below_one_a_device_month_and_steps_are_caught() -> None:
    """The stated noise: nights 1 % apart; `benchmarks/baselines/simulate_verdicts.py` goes further."""
    months, rule = 60, AlarmRule()
    false = sum(len(find_steps(make_nights(draw(100 + n, 30, 0.01)), rule)) for n in range(months))
    assert false / months * rule.cases <= 1
    caught = 0
    for seed in range(60):
        levels = draw(500 + seed, 37, 0.01)
        levels[30:] += log(1.03)
        caught += any(
            step.verdict == "worse" and step.found_run_id > "night 3" for step in find_steps(make_nights(levels))
        )
    assert caught / 60 >= 0.9
