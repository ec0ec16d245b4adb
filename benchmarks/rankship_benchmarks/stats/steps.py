"""Steps in a history of nights: finds when a case's time changed for good, at a known rate of false alarms.

The night is the unit: one number each, the median over its valid rounds, so that whatever moves a whole night is part
of the noise and is not taken for a change. Each night the rule checks whether the last few nights differ from the
level before them: the gain in fit of one more piece of a piecewise-constant line, as in asv and in penalised
segmentation (Killick et al. 2012). Its penalty is not BIC's, which gives three false steps a device-month in a month of
nights (simulated), but the quantile that keeps them below a stated number. A step that was found stays: later nights
do not remove it.
"""

from collections.abc import Sequence
from functools import cache
from math import exp, log, sqrt
from statistics import fmean, median
from typing import Literal

from rankship_benchmarks.stats.estimates import CONFIDENCE, Estimate, find_widening
from rankship_pipeline.foundation.frozen import record

_SPANS = (2, 3, 5, 7, 10, 14)  # numbers of last nights that may form the new level; one outlier is no step
_FEWEST_BEFORE, _MOST_BEFORE = 5, 28  # nights of the old level to compare with
_NIGHTS_A_MONTH = 30
_ODD, _NORMAL_FROM_MAD = 2.5, 1.4826
_CHOSEN = 1.2  # widens the interval, because the same nights choose a step's position and its size (simulated)
_SPANS_TRIED = 2.5  # the spans overlap, so they count as this many independent tests (simulated)


@record
class Night:
    """One case's valid rounds of one night, each in ns; empty if the night does not count, and `gap` says why.

    `canary_ns` are the canary's in the same night. If the first night that counts has them, times are taken relative to
    the canary, and a night without one is a gap; all nights must have the same canary, or none.
    """

    run_id: str
    started_utc: str
    rounds_ns: tuple[float, ...]
    canary_ns: tuple[float, ...] = ()
    gap: str | None = None


@record
class Step:
    """A lasting change: the first night of the new level, and the night (`found_*`) that gave enough evidence for it.

    `ratio` is the new level over the old with an interval over nights, from all nights of both levels so far. On the
    night that finds the step it is biased away from 1, because steps that chance makes larger are found sooner.
    """

    run_id: str
    started_utc: str
    found_run_id: str
    found_utc: str
    verdict: Literal["better", "worse"]
    ratio: Estimate


@record
class AlarmRule:
    """The smallest step to find, and the accepted rate of false alarms.

    `cases` is how many are watched on the device; they share its false alarms.
    """

    effect: float = 0.03
    cases: int = 6
    false_alarms_a_month: float = 0.25

    @property
    def tail(self) -> float:
        """The two-sided error probability of one test of one case."""
        return self.false_alarms_a_month / (_NIGHTS_A_MONTH * self.cases * _SPANS_TRIED)


def find_steps(nights: Sequence[Night], rule: AlarmRule | None = None) -> tuple[Step, ...]:
    """Find every step in one case's nights, taken in order.

    Nights that do not count are gaps: they neither make nor hide a step. Later nights change no step found before, they
    only make its ratio more certain.
    """
    chosen = rule or AlarmRule()
    counted = [night for night in nights if night.rounds_ns and night.gap is None]
    if counted and counted[0].canary_ns:
        counted = [night for night in counted if night.canary_ns]
    levels = _level_nights(counted)
    edges = [0]
    found: list[int] = []
    for tonight in range(1, len(counted) + 1):
        edge = _look_back(levels, edges[-1], tonight, chosen)
        if edge is not None:
            edges.append(edge)
            found.append(tonight - 1)
    ends = [*edges[1:], len(levels)]
    return tuple(
        _describe(counted[edges[place]], counted[last], _estimate_ratio(levels, edges[place - 1 : place + 1], end))
        for place, (last, end) in enumerate(zip(found, ends[1:], strict=True), start=1)
    )


def _describe(first: Night, last: Night, ratio: Estimate) -> Step:
    return Step(
        run_id=first.run_id,
        started_utc=first.started_utc,
        found_run_id=last.run_id,
        found_utc=last.started_utc,
        verdict="worse" if ratio.value > 1 else "better",
        ratio=ratio,
    )


def _level_nights(nights: Sequence[Night]) -> list[float]:
    """Return each night's log median; relative to its canary's if the first night has one."""
    canaries = bool(nights) and bool(nights[0].canary_ns)
    return [log(median(night.rounds_ns)) - (log(median(night.canary_ns)) if canaries else 0) for night in nights]


def _look_back(levels: Sequence[float], since: int, tonight: int, rule: AlarmRule) -> int | None:
    """Find where the last nights left the level before them; None if no step is certain yet."""
    for span in _SPANS:
        start = tonight - span
        before = levels[max(since, start - _MOST_BEFORE) : start] if start > since else []
        if len(before) < _FEWEST_BEFORE:
            break
        old, new = _clip_outliers(before, levels[start:tonight])
        gap = fmean(new) - fmean(old)
        if abs(gap) < log(1 + rule.effect / 2):
            continue
        if abs(gap) > _find_error(old, new) * _limit(len(old) - 1, rule.tail):
            edge = _find_edge(levels, since, tonight)
            return edge if tonight - edge >= min(_SPANS) else None  # one night alone: wait for the next
    return None


def _clip_outliers(before: Sequence[float], after: Sequence[float]) -> tuple[list[float], list[float]]:
    """Clip outliers to _ODD usual deviations from the median, so that one cannot make or hide a level."""
    middle = median(before)
    reach = _ODD * _NORMAL_FROM_MAD * median(abs(value - middle) for value in before)
    if len(after) > min(_SPANS):
        return _clip(before, reach), _clip(after, reach)
    return _clip(before, reach), [min(after, key=lambda value: abs(value - middle))] * len(after)


def _clip(values: Sequence[float], reach: float) -> list[float]:
    middle = median(values)
    return [min(max(value, middle - reach), middle + reach) for value in values]


def _find_error(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the standard error of two levels' distance from the old one's spread, wider for correlated nights."""
    spread = sqrt(sum((value - fmean(old)) ** 2 for value in old) / (len(old) - 1)) * find_widening(old)
    return spread * sqrt(1 / len(old) + 1 / len(new))


def _find_edge(levels: Sequence[float], since: int, tonight: int) -> int:
    """Return the step's position where two constant levels fit best (least absolute deviations, robust to outliers)."""

    def misfit(start: int) -> float:
        parts = levels[since:start], levels[start:tonight]
        return sum(sum(abs(value - median(part)) for value in part) for part in parts)

    return min(range(max(since + _FEWEST_BEFORE, tonight - _SPANS[-1]), tonight), key=misfit)


def _estimate_ratio(levels: Sequence[float], edges: Sequence[int], end: int) -> Estimate:
    """Return the level from `edges[1]` to `end` over the one from `edges[0]`, with Student's interval over nights."""
    before, after = levels[max(edges[0], edges[1] - _MOST_BEFORE) : edges[1]], levels[edges[1] : end]
    old, _ = _clip_outliers(before, after)
    gap = fmean(after) - fmean(old)
    reach = _CHOSEN * _find_error(before, after) * _limit(len(before) - 1, 1 - CONFIDENCE)
    low, high = exp(gap - reach), exp(gap + reach)
    return Estimate(value=exp(gap), low=low, high=high, confidence=CONFIDENCE, rounds=len(after))


@cache
def _limit(freedom: int, tail: float) -> float:
    """Return Student's two-sided limit."""
    from scipy.stats import t

    return float(t.isf(tail / 2, freedom))
