"""The energy of a rail between two instants, with bounds on what the meter may have missed.

The bounds are worst cases, so they are added. Nothing here divides by inferences or subtracts idle power.
"""

from bisect import bisect_left, bisect_right
from fractions import Fraction
from math import ceil

from rankship_pipeline.foundation.errors import TraceGap
from rankship_pipeline.foundation.frozen import record
from rankship_targets.trials.trace import Rail

_NS_PER_S = 1_000_000_000


@record
class Energy:
    """Energy of a window and the bounds of its error.

    `quantisation_uj` comes from the value's smallest step. `sampling_uj` comes from the unknown course between samples:
    a counter only rises, and power is assumed to be monotonic between two samples (a spike between them is missed).
    `lag_uj` comes from values that describe a moment earlier than their time.
    """

    energy_uj: int
    quantisation_uj: int
    sampling_uj: int
    lag_uj: int

    @property
    def uncertainty_uj(self) -> int:
        """The sum of all bounds."""
        return self.quantisation_uj + self.sampling_uj + self.lag_uj


def integrate(rail: Rail, start_ns: int, end_ns: int) -> Energy:
    """Compute the energy between two instants of the trace's clock; TraceGap if the rail does not cover them."""
    if end_ns <= start_ns:
        raise ValueError(f"the window ends at {end_ns} ns, before it starts at {start_ns} ns")
    _check_covered(rail, start_ns, end_ns)
    if rail.power_uw is not None:
        return _integrate_power(rail, rail.power_uw, start_ns, end_ns)
    return _subtract_counter(rail, rail.energy_uj or (), start_ns, end_ns)


def _check_covered(rail: Rail, start_ns: int, end_ns: int) -> None:
    hint = "sample for longer than the window, or more slowly, or find out what stopped the meter"
    if not rail.at_ns or start_ns < rail.at_ns[0] or end_ns > rail.at_ns[-1]:
        covered = f"{rail.at_ns[0]} to {rail.at_ns[-1]} ns" if rail.at_ns else "nothing"
        raise TraceGap(f"rail {rail.name} covers {covered}, the window is {start_ns} to {end_ns} ns", hint=hint)
    for gap in rail.gaps:
        if gap.start_ns < end_ns and gap.end_ns > start_ns:
            message = f"rail {rail.name} was {gap.why} from {gap.start_ns} to {gap.end_ns} ns, inside the window"
            raise TraceGap(message, hint=hint)


def _integrate_power(rail: Rail, power_uw: tuple[int, ...], start_ns: int, end_ns: int) -> Energy:
    """Apply the trapezoid rule; with power monotonic between samples, its error is at most half of each step."""
    inner = range(bisect_right(rail.at_ns, start_ns), bisect_left(rail.at_ns, end_ns))
    times = [start_ns, *(rail.at_ns[i] for i in inner), end_ns]
    powers = [_read_at(rail.at_ns, power_uw, start_ns)[0], *(power_uw[i] for i in inner)]
    powers.append(_read_at(rail.at_ns, power_uw, end_ns)[0])
    area, missed = Fraction(0), Fraction(0)  # in uW·ns, doubled
    for i in range(len(times) - 1):
        width = times[i + 1] - times[i]
        area += (powers[i] + powers[i + 1]) * width
    first, last = max(0, inner.start - 1), min(len(power_uw) - 1, inner.stop)
    for i in range(first, last):
        left, right = rail.at_ns[i], rail.at_ns[i + 1]
        whole = start_ns <= left and right <= end_ns
        width = min(right, end_ns) - max(left, start_ns)
        missed += abs(power_uw[i + 1] - power_uw[i]) * width * (1 if whole else 2)
    touched = power_uw[first : last + 1]
    return Energy(
        energy_uj=round(area / 2 / _NS_PER_S),
        quantisation_uj=ceil(Fraction(_resolve(rail) * (end_ns - start_ns), 2 * _NS_PER_S)) + 1,
        sampling_uj=ceil(missed / 2 / _NS_PER_S),
        lag_uj=ceil(Fraction(rail.lag_ns * (max(touched) - min(touched)), _NS_PER_S)),
    )


def _subtract_counter(rail: Rail, energy_uj: tuple[int, ...], start_ns: int, end_ns: int) -> Energy:
    """Subtract the counter's values at both ends; between two readings, the value is between theirs."""
    before, missed_before, slope_before = _read_at(rail.at_ns, energy_uj, start_ns)
    after, missed_after, slope_after = _read_at(rail.at_ns, energy_uj, end_ns)
    return Energy(
        energy_uj=round(after - before),
        quantisation_uj=_resolve(rail) + 1,
        sampling_uj=ceil(missed_before + missed_after),
        lag_uj=ceil((slope_before + slope_after) * rail.lag_ns),
    )


def _read_at(
    at_ns: tuple[int, ...], values: tuple[int, ...], instant_ns: int
) -> tuple[int | Fraction, Fraction, Fraction]:
    """Return the interpolated value, its largest error for a rising value, and the steepest slope next to it per ns."""
    i = bisect_left(at_ns, instant_ns)
    exact = at_ns[i] == instant_ns
    slopes = [
        Fraction(abs(values[k] - values[k - 1]), at_ns[k] - at_ns[k - 1])
        for k in ((i, i + 1) if exact else (i,))
        if 0 < k < len(values)
    ]
    slope = max(slopes, default=Fraction(0))
    if exact:
        return values[i], Fraction(0), slope
    share = Fraction(instant_ns - at_ns[i - 1], at_ns[i] - at_ns[i - 1])
    step = values[i] - values[i - 1]
    return values[i - 1] + share * step, max(share, 1 - share) * abs(step), slope


def _resolve(rail: Rail) -> int:
    """Return the smallest step of a rail's values; 1, the last digit, if it is not known."""
    return (rail.resolution_uw if rail.power_uw is not None else rail.resolution_uj) or 1
