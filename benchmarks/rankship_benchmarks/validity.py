"""Which trials count: a number that was taken while the device changed under it exists and must not be used."""

from collections.abc import Iterable

from rankship_pipeline.errors import ClockJumped, MeasurementError, Throttled
from rankship_targets.trial import DeviceState, Trial

CLOCK_JUMP_NS = 1_000_000_000  # time servers correct a clock by less than a thousandth
_NOW_BITS, _SINCE_BOOT_SHIFT = 0b1111, 16  # of a Raspberry Pi: under-voltage, capped, throttled, too warm
THROTTLED, JUMPED, GOVERNED = "throttled", "clock jumped", "governor changed"


def judge_trial(trial: Trial) -> tuple[str, ...]:
    """Give every reason why a trial must not count; what the device does not tell is no reason."""
    before, after = trial.before, trial.after
    reasons = (
        (THROTTLED, _has_throttled(before, after)),
        (JUMPED, _moved(before.clock_offset_ns, after.clock_offset_ns) > CLOCK_JUMP_NS),
        (GOVERNED, None not in {before.governor, after.governor} and before.governor != after.governor),
    )
    return tuple(reason for reason, holds in reasons if holds)


def keep_valid(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Keep the trials that count."""
    return tuple(trial for trial in trials if not judge_trial(trial))


def refuse_trials(run_id: str, trials: Iterable[Trial]) -> MeasurementError:
    """Make the error for a run of which no trial counts."""
    reasons = {reason for trial in trials for reason in judge_trial(trial)}
    message = f"run {run_id}: no trial counts: {', '.join(sorted(reasons))}"
    if THROTTLED in reasons:
        return Throttled(message, hint="cool the device, see to its power supply, and measure again")
    if JUMPED in reasons:
        return ClockJumped(message, hint="let the device's clock settle, keep it awake, and measure again")
    return MeasurementError(message, hint="let nothing else set the governor, and measure again")


def _has_throttled(before: DeviceState, after: DeviceState) -> bool:
    """Tell whether the device slowed itself down at either end of the trial or in between."""
    for one, bits in ((before, before.throttled_bits), (after, after.throttled_bits)):
        if (bits or 0) & _NOW_BITS or (one.cooling_steps or 0) > 0:
            return True
    if before.throttled_bits is not None and after.throttled_bits is not None:
        new = after.throttled_bits & ~before.throttled_bits
        if new >> _SINCE_BOOT_SHIFT & _NOW_BITS:
            return True
    counts = (before.throttle_count, after.throttle_count)
    return counts[0] is not None and counts[1] is not None and counts[1] > counts[0]


def _moved(before: int | None, after: int | None) -> int:
    return 0 if before is None or after is None else abs(after - before)
