"""Which trials count: a trial during which the device changed must not be used.

A reason has one of two weights. One that *refuses* leaves a trial out of every figure. One that *doubts* leaves it in
its own run's report, which names the doubt, but no verdict between runs uses it: times from a busy device are real, but
do not show what the artifact changed. A reading that the device does not report is never a reason.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Literal

from rankship_benchmarks.stats.estimates import relative_drift
from rankship_pipeline.foundation.errors import ClockJumped, MeasurementError, Throttled
from rankship_targets.trials.trial import DeviceState, Trial

Weight = Literal["refuses", "doubts"]

CLOCK_JUMP_NS = 1_000_000_000  # time servers correct a clock by less than a thousandth
FEWEST_SAMPLES = 3  # the median of two is no sample
LOW_BATTERY_PERCENT = 20  # from about here on phones save power
FREQUENCY_MOVE = 0.10
DRIFT = 0.10
STALL_NS, STALL_FACTOR = 500_000_000, 20  # one inference so long, and so many times the median: the process was stopped
CANARY_BAND = 0.10  # a round's canary against the run's median round
WAITED = 0.01  # of the loop: below the 1.5 % that verdicts call a change, even if every inference is affected equally
_FEWEST_CANARIES = 3
_NOW_BITS, _SINCE_BOOT_SHIFT = 0b1111, 16  # of a Raspberry Pi: under-voltage, capped, throttled, too warm
THROTTLED, JUMPED, GOVERNED, CANARY = "throttled", "clock jumped", "governor changed", "canary off"
FREQUENCY, DRIFTED, OTHER_LOAD, INTERRUPTED = "frequency moved", "drift inside the trial", "other load", "interrupted"
BUSY = (OTHER_LOAD, INTERRUPTED, DRIFTED)  # what other work on the device does to a trial


def judge_trial(trial: Trial) -> tuple[str, ...]:
    """Return every reason why a trial must not count."""
    return tuple(reason for reason, (weight, holds) in RULES.items() if weight == "refuses" and holds(trial))


def doubt_trial(trial: Trial) -> tuple[str, ...]:
    """Return every reason why no verdict may use a trial that counts."""
    return tuple(reason for reason, (weight, holds) in RULES.items() if weight == "doubts" and holds(trial))


def keep_valid(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Keep the trials that count."""
    return tuple(trial for trial in trials if not judge_trial(trial))


def keep_trusted(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Keep the trials of one run that verdicts may use."""
    off = find_canary_off(trials)
    return tuple(
        trial for trial in trials if not judge_trial(trial) and not doubt_trial(trial) and trial.round not in off
    )


def name_distrust(mine: Iterable[Trial], everything: Sequence[Trial]) -> dict[str, int]:
    """Count for each reason, of either weight, how many trials of `mine` it holds for; `everything` is their run."""
    off = find_canary_off(everything)
    counts: dict[str, int] = {}
    for trial in mine:
        canary = (CANARY,) if trial.round in off else ()
        for reason in (*judge_trial(trial), *doubt_trial(trial), *canary):
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def find_canary_off(trials: Iterable[Trial]) -> set[int]:
    """Find the rounds in which the canary was further than CANARY_BAND from the run's median round."""
    canaries = [one for one in trials if one.key.variant == "canary" and one.samples_ns and min(one.samples_ns) > 0]
    times = {one.round: median(one.samples_ns) for one in canaries}
    if len(times) < _FEWEST_CANARIES:
        return set()
    middle = median(times.values())
    return {number for number, time in times.items() if abs(time / middle - 1) > CANARY_BAND}


def refuse_trials(run_id: str, trials: Iterable[Trial]) -> MeasurementError:
    """Make the error for a run without a trial that counts."""
    reasons = {reason for trial in trials for reason in judge_trial(trial)}
    message = f"run {run_id}: no trial counts: {', '.join(sorted(reasons))}"
    if THROTTLED in reasons:
        return Throttled(message, hint="cool the device, check its power supply, and measure again")
    if JUMPED in reasons:
        return ClockJumped(message, hint="let the device's clock settle, keep it awake, and measure again")
    return MeasurementError(message, hint="fix what the message names, and measure again")


def find_frequency_move(trial: Trial) -> float | None:
    """Return the largest relative change of any core's clock that the trial could run on; None if not reported."""
    early, late = trial.before.frequency_khz, trial.after.frequency_khz
    if not early or not late or len(early) != len(late):
        return None
    cores = [core for core in trial.conditions.cpus or range(len(early)) if core < len(early)] or range(len(early))
    return max(abs(late[core] - early[core]) / max(early[core], 1) for core in cores)


def _has_throttled(trial: Trial) -> bool:
    """Return whether the device throttled at either end of the trial or in between."""
    before, after = trial.before, trial.after
    for one, bits in ((before, before.throttled_bits), (after, after.throttled_bits)):
        if (bits or 0) & _NOW_BITS or (one.cooling_steps or 0) > 0:
            return True
    if before.throttled_bits is not None and after.throttled_bits is not None:
        new = after.throttled_bits & ~before.throttled_bits
        if new >> _SINCE_BOOT_SHIFT & _NOW_BITS:
            return True
    counts = (before.throttle_count, after.throttle_count)
    return counts[0] is not None and counts[1] is not None and counts[1] > counts[0]


def _has_jumped(trial: Trial) -> bool:
    early, late = trial.before.clock_offset_ns, trial.after.clock_offset_ns
    return early is not None and late is not None and abs(late - early) > CLOCK_JUMP_NS


def _has_changed(read: Callable[[DeviceState], str | None]) -> Callable[[Trial], bool]:
    def holds(trial: Trial) -> bool:
        early, late = read(trial.before), read(trial.after)
        return None not in {early, late} and early != late

    return holds


def _has_low_battery(trial: Trial) -> bool:
    return any(
        state.battery_percent is not None and state.battery_percent < LOW_BATTERY_PERCENT and not state.charging
        for state in (trial.before, trial.after)
    )


def _has_moved_frequency(trial: Trial) -> bool:
    """Return whether the clock moved under the governor `performance`; under others it follows the load."""
    return trial.before.governor == "performance" and (find_frequency_move(trial) or 0) > FREQUENCY_MOVE


def _has_drifted(trial: Trial) -> bool:
    enough = len(trial.samples_ns) > FEWEST_SAMPLES and min(trial.samples_ns) > 0
    return enough and abs(relative_drift(trial.samples_ns)) > DRIFT


def _has_other_load(trial: Trial) -> bool:
    """Return whether other processes took processor time from the trial.

    One thread's waiting time shows it. Several threads also wait for each other, and waking one counts as waiting:
    for them, and if no waiting time is reported, the test is whether the load before the trial exceeded the cores.
    """
    if trial.threads == 1 and trial.waited_ns is not None and trial.loop is not None:
        return trial.waited_ns > WAITED * trial.loop.length_ns
    cores = len(trial.before.frequency_khz or trial.conditions.cpus or ())
    load = trial.before.load_1m_milli
    return cores > 0 and load is not None and load > 1000 * cores


def _was_interrupted(trial: Trial) -> bool:
    if not trial.samples_ns:
        return False
    longest = max(trial.samples_ns)
    return longest > STALL_NS and longest > STALL_FACTOR * median(trial.samples_ns)


# reason → its weight, and whether it holds for a trial. "canary off" holds for a whole round: find_canary_off.
RULES: dict[str, tuple[Weight, Callable[[Trial], bool]]] = {
    THROTTLED: ("refuses", _has_throttled),
    JUMPED: ("refuses", _has_jumped),
    GOVERNED: ("refuses", _has_changed(lambda state: state.governor)),
    "device restarted": ("refuses", _has_changed(lambda state: state.boot_id)),
    "battery low": ("refuses", _has_low_battery),
    "too few samples": ("refuses", lambda trial: len(trial.samples_ns) < FEWEST_SAMPLES),
    FREQUENCY: ("doubts", _has_moved_frequency),
    DRIFTED: ("doubts", _has_drifted),
    OTHER_LOAD: ("doubts", _has_other_load),
    INTERRUPTED: ("doubts", _was_interrupted),
}
