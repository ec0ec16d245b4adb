"""Energy of one inference from a metered trial: a rest, a timed loop, a rest, one meter throughout.

The total is the rails' energy while inferences ran; the marginal figure subtracts the mean power at rest. Bounds are
worst cases and add up: the meter's own (meters/integrate.py), its calibration, the difference between the rests. A
figure that they do not support is refused.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from rankship_benchmarks.bundle.suite import EnergyPlan
from rankship_pipeline.foundation.errors import MeasurementError
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.installing import show_kit
from rankship_targets.meters.integrate import integrate
from rankship_targets.trials.trace import PowerTrace, Rail
from rankship_targets.trials.trial import MeteredTrial, Span

FEWEST_READINGS = 50  # of power in one window; energy counters need no minimum
COARSEST = 0.25  # the meter's own bounds over the total
_RESTS = 2
_NS_PER_S = 1_000_000_000


@record
class Bounded:
    """Energy of one inference and the worst case of its error, without the meter's calibration."""

    value_nj: float
    bound_nj: float


@record
class RoundEnergy:
    """One trial's figures. `overlap` says why the marginal figure is not supported; empty if it is.

    `idle_uw` is the mean power of both rests, `idle_drift_uw` the difference between them.
    """

    round: int
    inferences: int
    total: Bounded
    marginal: Bounded
    overlap: str
    idle_uw: int
    idle_drift_uw: int


def read_round(metered: MeteredTrial, plan: EnergyPlan) -> RoundEnergy:
    """Compute one trial's figures.

    MeasurementError if there are none: the runner reported no loop, the meter uses another clock or lacks a rail, or it
    read too rarely or too coarsely. TraceGap if the trace does not cover the windows.
    """
    trial, trace = metered.trial, metered.trace
    loop = trial.loop
    if loop is None or len(trial.idle) != _RESTS:
        message = f"{trial.runtime.name} does not report when its timed loop ran"
        raise MeasurementError(message, hint=f"{show_kit(trial.device)}: the new runner does")
    if trace.clock != "monotonic":
        message = (
            f"meter {trace.meter} uses the clock {trace.clock!r}, but the windows use the device's monotonic clock"
        )
        raise MeasurementError(message, hint="use a meter that the device itself reads")
    rails = choose_rails(trace, plan.rails)
    for window in (*trial.idle, loop):
        _refuse_few(rails, window)
    work = _Power.read(rails, loop)
    rests = [_Power.read(rails, window) for window in trial.idle]
    seconds = loop.length_ns / _NS_PER_S
    idle_uw = sum(rest.mean_uw for rest in rests) / len(rests)
    drift_uw = abs(rests[1].mean_uw - rests[0].mean_uw)
    idle_bound_uw = max(rest.bound_uw for rest in rests) + drift_uw / 2
    _refuse_coarse(work)

    def share(power_uw: float) -> float:
        return power_uw * seconds * 1000 / len(trial.samples_ns)  # uW times s is 1000 nJ

    return RoundEnergy(
        round=trial.round,
        inferences=len(trial.samples_ns),
        total=Bounded(value_nj=share(work.mean_uw), bound_nj=share(work.bound_uw)),
        marginal=Bounded(value_nj=share(work.mean_uw - idle_uw), bound_nj=share(work.bound_uw + idle_bound_uw)),
        overlap=_find_overlap(work, _Power(mean_uw=idle_uw, bound_uw=idle_bound_uw)),
        idle_uw=round(idle_uw),
        idle_drift_uw=round(drift_uw),
    )


def choose_rails(trace: PowerTrace, wanted: Sequence[str]) -> tuple[Rail, ...]:
    """Find the rails to add up; MeasurementError if one is missing, or none is named and there are several."""
    known = {rail.name: rail for rail in trace.rails}
    missing = [name for name in wanted if name not in known]
    if missing or (not wanted and len(known) != 1):
        problem = f"has no rail {missing[0]!r}" if missing else f"has {len(known)} rails and none was chosen"
        hint = f"name those to add up as `rails` of the meter, of: {', '.join(known) or 'none'}"
        raise MeasurementError(f"meter {trace.meter} {problem}", hint=hint)
    return tuple(known[name] for name in wanted) or trace.rails


@record
class _Power:
    """Mean power of one window, all rails together, and the worst case of the meter's error."""

    mean_uw: float
    bound_uw: float

    @classmethod
    def read(cls, rails: Sequence[Rail], window: Span) -> "_Power":
        energies = [integrate(rail, window.start_ns, window.end_ns) for rail in rails]
        seconds = window.length_ns / _NS_PER_S
        mean = sum(one.energy_uj for one in energies) / seconds
        return cls(mean_uw=mean, bound_uw=sum(one.uncertainty_uj for one in energies) / seconds)


def _refuse_few(rails: Sequence[Rail], window: Span) -> None:
    for rail in rails:
        count = bisect_right(rail.at_ns, window.end_ns) - bisect_left(rail.at_ns, window.start_ns)
        if rail.power_uw is not None and 0 < count < FEWEST_READINGS:
            seconds = window.length_ns / _NS_PER_S
            message = f"too few readings: {count} of rail {rail.name} in {seconds:.1f} s, {FEWEST_READINGS} are needed"
            raise MeasurementError(message, hint="read the meter more often, or make the windows longer")


def _refuse_coarse(work: _Power) -> None:
    if work.mean_uw <= 0:
        raise MeasurementError("no power was drawn while inferences ran", hint="check how the meter is connected")
    if work.bound_uw > COARSEST * work.mean_uw:
        powers = f"{work.mean_uw / 1e3:.0f} ± {work.bound_uw / 1e3:.0f} mW"
        message = f"resolution too coarse: the meter reads {powers} while inferences ran"
        raise MeasurementError(message, hint="read it more often, make the windows longer, or take a finer meter")


def _find_overlap(work: _Power, idle: _Power) -> str:
    """Return why the marginal figure is not supported; empty if work is clearly above rest.

    The meter's calibration does not matter here: a gain error is the same in both.
    """
    if work.mean_uw - idle.mean_uw > work.bound_uw + idle.bound_uw:
        return ""
    busy = f"busy {work.mean_uw / 1e3:.0f} ± {work.bound_uw / 1e3:.0f}"
    return f"{busy} mW and idle {idle.mean_uw / 1e3:.0f} ± {idle.bound_uw / 1e3:.0f} mW overlap"
