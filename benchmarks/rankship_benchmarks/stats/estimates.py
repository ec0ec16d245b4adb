"""Numbers with their uncertainty: rounds, not inferences, are the unit of independence.

Each trial gives one median; the median over rounds is the result. Intervals and bounds are order statistics, exact
for any distribution (David & Nagaraja, Order Statistics, §7.1), so nothing here assumes that timings are normal. They
assume that rounds are independent; where enough rounds show that they are not, intervals are widened.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import ceil, comb, floor, log2, sqrt
from statistics import median

from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trial import Trial

CONFIDENCE = 0.95
CORRELATION_ROUNDS = 12  # fewer cannot show whether rounds are correlated
_CLUSTER_SAMPLES = 100
_STRONGEST_CORRELATION = 0.8
HOPELESS = 2.99  # the widening from which rounds are too correlated for any interval


@record
class Estimate:
    """A median over `rounds`; `low` and `high` are None if the rounds are too few for an interval of `confidence`.

    `widening` is the factor by which the interval was widened for correlated rounds (1: not at all).
    """

    value: float
    low: float | None
    high: float | None
    confidence: float
    rounds: int
    widening: float = 1.0


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, widening: float = 1.0
) -> tuple[float, float] | None:
    """Return the interval that holds the median with at least `confidence`; None below `count_needed(confidence)`.

    `widening` moves both ends outwards in rank, in proportion to their distance from the middle, at most to the whole
    range; None from HOPELESS on.
    """
    count, outside = len(values), (1 - confidence) / 2
    rank, below = 0, 0.5**count  # `below` is P(the rank-th smallest value, counted from 0, lies above the median)
    while below <= outside:
        rank += 1
        below += comb(count, rank) / 2**count
    if rank and widening > 1:
        rank = max(1, floor(count / 2 + 1 - widening * (count / 2 + 1 - rank)))
    if rank == 0 or widening >= HOPELESS:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank]


def find_correlation(*runs: Sequence[float]) -> float:
    """Estimate the lag-1 autocorrelation of rounds, pooled over runs; 0 to 0.8.

    The bias of short series is added back (Kendall 1954: (1 + 3r)/n). It is 0 below CORRELATION_ROUNDS, because such a
    series is too short to show it.
    """
    if min(map(len, runs)) < CORRELATION_ROUNDS:
        return 0.0
    product = square = 0.0
    for values in runs:
        centre = sum(values) / len(values)
        apart = [value - centre for value in values]
        product += sum(one * following for one, following in pairwise(apart))
        square += sum(one * one for one in apart)
    seen = product / square if square else 0.0
    corrected = seen + (1 + 3 * max(seen, -1 / 3)) * len(runs) / sum(map(len, runs))
    return min(max(corrected, 0.0), _STRONGEST_CORRELATION)


def find_widening(*runs: Sequence[float]) -> float:
    """Return the factor on the standard error of rounds that are an autoregression: √((1 + ρ)/(1 - ρ))."""
    correlation = find_correlation(*runs)
    return sqrt((1 + correlation) / (1 - correlation))


def count_needed(confidence: float = CONFIDENCE) -> int:
    """Return the fewest values that give an interval of the median: 6 at 95 %."""
    return ceil(log2(2 / (1 - confidence)))


def estimate_median(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Take the median of one value per round, in the rounds' order, with its interval."""
    widening = find_widening(values)
    low, high = median_interval(values, confidence, widening) or (None, None)
    return Estimate(
        value=median(values), low=low, high=high, confidence=confidence, rounds=len(values), widening=widening
    )


def median_by_round(trials: Iterable[Trial]) -> dict[int, float]:
    """Map each round to its median inference in ns, in the rounds' order."""
    return {trial.round: median(trial.samples_ns) for trial in sorted(trials, key=lambda trial: trial.round)}


def estimate_ratio(
    numerator: Mapping[int, float], denominator: Mapping[int, float], confidence: float = CONFIDENCE
) -> Estimate | None:
    """Take the median of per-round ratios, each round paired with itself so that drift cancels; None without a pair."""
    ratios = [numerator[number] / denominator[number] for number in numerator if number in denominator]
    return estimate_median(ratios, confidence) if ratios else None


def percentile_bound(samples: Sequence[int], share: float, confidence: float = CONFIDENCE) -> int | None:
    """Return the smallest sample that is at or above the `share` quantile with `confidence`; None if there is none.

    95 % needs 29 samples for p90, 299 for p99 and 2,995 for p99.9; more where slow samples come in clusters, which
    _CLUSTER_SAMPLES or more can show. It describes one trial.
    """
    from scipy.stats import binom

    count, ordered = len(samples), sorted(samples)
    rank = int(binom.ppf(confidence, count, share))
    if count >= _CLUSTER_SAMPLES:
        edge = ordered[int(share * count)]
        clustered = find_widening([float(sample > edge) for sample in samples])
        rank = round(share * count + clustered * (rank - share * count))
    return ordered[rank] if rank < count else None


def relative_spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    return (_quantile(values, 0.75) - _quantile(values, 0.25)) / median(values)


def relative_drift(samples: Sequence[int], parts: int = 2) -> float:
    """Return how much slower (above 0) or faster the last of a trial's equal parts was than the first, by medians."""
    first, last = len(samples) // parts, (parts - 1) * len(samples) // parts
    return median(samples[last:]) / median(samples[:first]) - 1 if first else 0.0


def _quantile(values: Sequence[float], share: float) -> float:
    """Interpolate linearly between order statistics."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
