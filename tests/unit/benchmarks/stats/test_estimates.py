from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import quantile_test

from rankship_benchmarks.stats.estimates import (
    count_needed,
    estimate_median,
    estimate_ratio,
    median_interval,
    percentile_bound,
    relative_drift,
    relative_spread,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]


def draw_lognormal(random: np.random.Generator, count: int) -> np.ndarray:
    return random.lognormal(0, 0.5, count)


def draw_bimodal(random: np.random.Generator, count: int) -> np.ndarray:
    """Two clock speeds: 70 % at about 1, the rest at about 2."""
    return np.where(random.random(count) < 0.7, 1.0, 2.0) + random.normal(0, 0.05, count)


@pytest.mark.parametrize("draw", [draw_lognormal, draw_bimodal])
@pytest.mark.parametrize("rounds", [6, 11, 20])
def test_the_interval_covers_the_median_at_least_as_often_as_it_says(draw: Draw, rounds: int) -> None:
    random = np.random.default_rng(1)
    truth = np.median(draw(random, 1_000_000))
    covered = 0
    for _ in range(2000):
        interval = median_interval(draw(random, rounds).tolist())
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert covered / 2000 >= 0.95 - 0.01  # two standard errors of the simulation


@pytest.mark.parametrize("draw", [draw_lognormal, draw_bimodal])
@pytest.mark.parametrize(("share", "count"), [(0.9, 29), (0.9, 60), (0.99, 299)])
def test_the_bound_lies_above_the_percentile_at_least_as_often_as_it_says(draw: Draw, share: float, count: int) -> None:
    random = np.random.default_rng(2)
    truth = np.quantile(draw(random, 1_000_000), share) * 1e6
    held = []
    for _ in range(1000):
        bound = percentile_bound([int(1e6 * value) for value in draw(random, count)], share)
        if bound is not None:  # at the fewest samples, ones that seem to come in clusters are too few
            held.append(bound >= truth - 1)
    assert len(held) >= 950
    assert np.mean(held) >= 0.95 - 0.02


@pytest.mark.parametrize(("share", "needed"), [(0.5, 5), (0.9, 29), (0.99, 299), (0.999, 2995)])
def test_a_percentile_has_no_bound_below_the_samples_it_needs(share: float, needed: int) -> None:
    samples = np.random.default_rng(needed).permutation(needed)
    assert percentile_bound((samples[samples < needed - 1]).tolist(), share) is None
    assert percentile_bound(samples.tolist(), share) == needed - 1


def test_slow_samples_in_clusters_move_the_bound_up() -> None:
    samples = np.random.default_rng(3).permutation(400)
    apart, together = percentile_bound(samples.tolist(), 0.9), percentile_bound(range(400), 0.9)
    assert apart is not None
    assert together is None or together > apart


def test_five_rounds_give_no_interval_and_six_give_their_whole_range() -> None:
    assert count_needed() == 6
    assert count_needed(0.99) == 8
    assert median_interval([5, 3, 1, 2, 4]) is None
    assert median_interval([6, 5, 3, 1, 2, 4]) == (1, 6)
    assert estimate_median([1.0, 2.0]).low is None


@pytest.mark.parametrize("count", [6, 7, 9, 12, 25, 100])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_is_scipys(count: int, confidence: float) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    theirs = quantile_test(values, p=0.5).confidence_interval(confidence)
    ours = median_interval(values.tolist(), confidence)
    if ours is None:
        assert np.isnan(theirs.low)
    else:
        assert ours == pytest.approx((theirs.low, theirs.high))


def test_pairing_by_round_cancels_drift_that_both_share() -> None:
    drift = {number: 1 + 0.1 * number for number in range(8)}
    ratio = estimate_ratio({n: 50 * d for n, d in drift.items()}, {n: 100 * d for n, d in drift.items()})
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_uses_only_rounds_that_both_have() -> None:
    ratio = estimate_ratio({0: 1.0, 1: 1.0, 2: 9.0}, {0: 2.0, 1: 2.0, 3: 1.0})
    assert ratio is not None
    assert (ratio.value, ratio.rounds) == (0.5, 2)
    assert estimate_ratio({0: 1.0}, {1: 1.0}) is None


def test_spread_and_drift_are_relative() -> None:
    assert relative_spread([100, 100, 100]) == 0
    assert relative_spread([90, 100, 110, 120]) == pytest.approx((112.5 - 97.5) / 105)
    assert relative_drift([100, 100, 110, 110]) == pytest.approx(0.1)
    assert relative_drift([100]) == 0
