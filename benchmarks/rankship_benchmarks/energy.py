"""Energy of one inference from a power trace: an idle window, busy windows, an idle window, one meter throughout.

The total is what the rail gave while inferences ran; the marginal figure takes the idle power away. Bounds are worst
cases and add: the meter's own (integrate.py), its calibration, how far the idle power drifted. How far the windows lie
from each other stands beside them. A figure that its bounds do not support is refused, not printed small.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, sqrt
from statistics import fmean, stdev

from rankship_benchmarks.stats import CONFIDENCE
from rankship_pipeline.errors import MeasurementError
from rankship_pipeline.records import record
from rankship_targets.integrate import Energy, integrate
from rankship_targets.trace import PowerTrace, Provenance, Rail

SHORTEST_NS = 10_000_000_000
FEWEST_BUSY = 5
_NS_PER_S = 1_000_000_000


@record
class Window:
    """A stretch of the trace's clock, and how many inferences ran in it: none while idle."""

    start_ns: int
    end_ns: int
    inferences: int = 0

    @property
    def length_ns(self) -> int:
        """Its length."""
        return self.end_ns - self.start_ns


@record
class EnergyEstimate:
    """Energy of one inference: the mean over windows, and how far it may be from the truth.

    `bound_nj` is the worst case of meter, calibration and idle drift; `spread_nj` is Student's 95 % half-width over
    windows. The truth lies within both together, as often as that.
    """

    value_nj: int
    bound_nj: int
    spread_nj: int
    windows: int

    @property
    def uncertainty_nj(self) -> int:
        """Both together."""
        return self.bound_nj + self.spread_nj


@record
class EnergyReading:
    """What one rail says of one artifact: `marginal` is None where idle and busy cannot be told apart, `refused` why.

    `idle_uw` is the mean power of both idle windows, `idle_drift_uw` what lies between them.
    """

    meter: str
    provenance: Provenance
    rail: str
    total: EnergyEstimate
    marginal: EnergyEstimate | None
    refused: str | None
    idle_uw: int
    idle_drift_uw: int
    calibration_ppm: int | None


def read_energy(
    trace: PowerTrace,
    rail: str,
    idle: tuple[Window, Window],
    busy: Sequence[Window],
    calibration_ppm: int | None = None,
) -> EnergyReading:
    """Compute both figures of one rail; `calibration_ppm` is the meter's gain error, None where nobody stated one.

    MeasurementError where the windows are too few, too short or out of order; TraceGap where the trace does not cover
    them.
    """
    _check_windows(idle, busy)
    found = next((one for one in trace.rails if one.name == rail), None)
    if found is None:
        known = ", ".join(one.name for one in trace.rails) or "none"
        raise MeasurementError(f"meter {trace.meter} has no rail {rail!r}", hint=f"its rails: {known}")
    gain = calibration_ppm or 0
    powers = [_Power.read(found, window, gain) for window in idle]
    works = [_Power.read(found, window, gain) for window in busy]
    idle_uw = sum(power.mean_uw for power in powers) / len(powers)
    drift_uw = abs(powers[1].mean_uw - powers[0].mean_uw)
    idle_bound_uw = max(power.bound_uw for power in powers) + drift_uw / 2
    refused = _refuse_marginal(works, idle_uw, idle_bound_uw)
    return EnergyReading(
        meter=trace.meter,
        provenance=trace.provenance,
        rail=rail,
        total=_estimate(busy, [(work.mean_uw, work.bound_uw) for work in works]),
        marginal=None
        if refused
        else _estimate(busy, [(work.mean_uw - idle_uw, work.bound_uw + idle_bound_uw) for work in works]),
        refused=refused,
        idle_uw=round(idle_uw),
        idle_drift_uw=round(drift_uw),
        calibration_ppm=calibration_ppm,
    )


@record
class _Power:
    """Mean power of one window and the worst case of its error."""

    mean_uw: float
    bound_uw: float

    @classmethod
    def read(cls, rail: Rail, window: Window, calibration_ppm: int) -> "_Power":
        energy: Energy = integrate(rail, window.start_ns, window.end_ns)
        seconds = window.length_ns / _NS_PER_S
        mean = energy.energy_uj / seconds
        return cls(mean_uw=mean, bound_uw=energy.uncertainty_uj / seconds + abs(mean) * calibration_ppm / 1e6)


def _check_windows(idle: tuple[Window, Window], busy: Sequence[Window]) -> None:
    hint = "idle, five times or more busy for ten seconds, idle: in this order, and one meter running throughout"
    if len(busy) < FEWEST_BUSY:
        raise MeasurementError(f"{len(busy)} busy windows, {FEWEST_BUSY} are the fewest", hint=hint)
    ordered = [idle[0], *busy, idle[1]]
    short = [one for one in ordered if one.length_ns < SHORTEST_NS]
    if short:
        length = short[0].length_ns / _NS_PER_S
        raise MeasurementError(f"a window lasts {length:.1f} s, 10 s is the shortest", hint=hint)
    if any(after.start_ns < before.end_ns for before, after in pairwise(ordered)):
        raise MeasurementError("the windows overlap or are out of order", hint=hint)
    if any(one.inferences < 1 for one in busy) or any(one.inferences for one in idle):
        raise MeasurementError("a busy window has no inference, or an idle one has some", hint=hint)


def _refuse_marginal(works: Sequence[_Power], idle_uw: float, idle_bound_uw: float) -> str | None:
    """Say why the marginal figure is refused; None where every busy window lies clearly above idle."""
    lowest = min(works, key=lambda work: work.mean_uw - work.bound_uw)
    if lowest.mean_uw - lowest.bound_uw > idle_uw + idle_bound_uw:
        return None
    busy, idle = f"{lowest.mean_uw / 1e3:.0f} ± {lowest.bound_uw / 1e3:.0f}", f"{idle_uw / 1e3:.0f}"
    return f"busy {busy} mW and idle {idle} ± {idle_bound_uw / 1e3:.0f} mW overlap"


def _estimate(busy: Sequence[Window], powers: Sequence[tuple[float, float]]) -> EnergyEstimate:
    """Turn each window's power, and its bound, into energy per inference."""
    from scipy.stats import t

    # uW times ns is 1e-6 nJ
    each = [power * one.length_ns / 1e6 / one.inferences for one, (power, _) in zip(busy, powers, strict=True)]
    bounds = [bound * one.length_ns / 1e6 / one.inferences for one, (_, bound) in zip(busy, powers, strict=True)]
    return EnergyEstimate(
        value_nj=round(fmean(each)),
        bound_nj=ceil(max(bounds)),
        spread_nj=ceil(float(t.isf((1 - CONFIDENCE) / 2, len(each) - 1)) * stdev(each) / sqrt(len(each))),
        windows=len(busy),
    )
