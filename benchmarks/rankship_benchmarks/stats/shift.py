"""Compares one run's rounds with another's: the rank test, and the ratio and interval that belong to it.

The ratio is the median of all pairwise ratios between the two runs' rounds (Hodges & Lehmann 1963), its interval the
inverted rank test (Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, §4.3): exact for any distribution
that both runs share up to a factor. For correlated rounds, interval and p-value are widened by the same factor.
"""

from collections.abc import Sequence
from functools import cache
from math import comb, exp, floor, log, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

from rankship_benchmarks.stats.estimates import CONFIDENCE, HOPELESS, Estimate, find_widening
from rankship_pipeline.foundation.frozen import record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_EXACT_PAIRS = 1600  # above, the normal approximation of the rank sum is indistinguishable


@record
class Shift:
    """A ratio of `after` to `before`, and the two-sided p-value of no change."""

    ratio: Estimate
    p_value: float


def find_shift(before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE) -> Shift:
    """Compare the rounds of two runs, each in order; values are positive, of any one unit."""
    import numpy as np
    from scipy.stats import mannwhitneyu

    logs = [log(value) for value in before], [log(value) for value in after]
    ratios = np.sort(np.subtract.outer(np.array(logs[1]), np.array(logs[0])).ravel())
    widening = find_widening(*logs)
    place = _find_place((len(before), len(after)), confidence, widening)
    low, high = (ratios[place], ratios[-1 - place]) if place is not None else (None, None)
    p_value = float(mannwhitneyu(after, before).pvalue)
    if widening > 1:
        p_value = 2 * NormalDist().cdf(NormalDist().inv_cdf(max(p_value, 1e-300) / 2) / widening)
    ratio = Estimate(
        value=exp(float(np.median(ratios))),
        low=None if low is None else exp(float(low)),
        high=None if high is None else exp(float(high)),
        confidence=confidence,
        rounds=min(len(before), len(after)),
        widening=widening,
    )
    return Shift(ratio=ratio, p_value=min(p_value, 1.0))


def find_least_p(before: int, after: int) -> float:
    """Return the smallest p-value that so many rounds can give."""
    return 2 / comb(before + after, before)


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for several cases (Holm 1979), so that each can be compared with the level for all of them."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for passed, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - passed) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _find_place(counts: tuple[int, int], confidence: float, widening: float) -> int | None:
    """Find which of the ordered pairwise differences, counted from 0 at each end, bounds the interval."""
    pairs, outside = counts[0] * counts[1], (1 - confidence) / 2
    if pairs <= _EXACT_PAIRS:
        below = _count_ranks(*counts).cumsum() / comb(sum(counts), counts[0])
        reached = int((below <= outside).sum()) - 1
    else:
        deviation = sqrt(pairs * (sum(counts) + 1) / 12)
        reached = floor(pairs / 2 + NormalDist().inv_cdf(outside) * deviation - 0.5)
    if reached < 0 or widening >= HOPELESS:
        return None
    return max(0, floor(pairs / 2 - widening * (pairs / 2 - reached))) if widening > 1 else reached


@cache
def _count_ranks(first: int, second: int) -> "NDArray[np.float64]":
    """Count the orders of two samples that give each value of the rank sum's U: [U], 0 to first·second.

    They are the Gaussian binomial coefficient's, built exactly, one factor (1 - q^(second+i)) / (1 - q^i) at a time.
    """
    import numpy as np

    ways = np.zeros(first * second + 1, dtype=object)
    ways[0] = 1
    for step in range(1, first + 1):
        reach = min(second + step, ways.size)
        ways[reach:] = ways[reach:] - ways[: ways.size - reach]
        for rest in range(step):
            ways[rest::step] = ways[rest::step].cumsum()
    return ways.astype(np.float64)
