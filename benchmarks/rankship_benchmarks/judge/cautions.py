"""Cautions: every reason to distrust a bundle of trials, found in the data itself."""

from collections.abc import Collection, Iterable
from datetime import datetime
from itertools import pairwise

from rankship_benchmarks.bundle.bundle import STAND_IN, Bundle
from rankship_benchmarks.judge.validity import (
    BUSY,
    CANARY,
    FREQUENCY,
    doubt_trial,
    find_canary_off,
    find_frequency_move,
    judge_trial,
)
from rankship_benchmarks.stats.estimates import (
    CORRELATION_ROUNDS,
    count_needed,
    find_widening,
    median_by_round,
    relative_drift,
    relative_spread,
)
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.delegates import find_facts
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import THIS_MACHINE
from rankship_targets.trials.trial import Trial

# Limits above which a caution is printed.
_FREQUENCY_MOVE = 0.10
_ROUND_SPREAD = 0.05
_WIDENED = 1.3
_TRIAL_DRIFT = 0.05
_ROUND_GAP_S = 600


@record
class CautionGroup:
    """Cautions that have one cause: a heading for all of them, what to do, and each one in `details`.

    If there is only one caution, it is the `heading`, and `details` is empty.
    """

    heading: str
    advice: str = ""
    details: tuple[str, ...] = ()

    @property
    def cautions(self) -> tuple[str, ...]:
        """Every caution of the group, in full."""
        return self.details or (self.heading,)


def group_cautions(bundle: Bundle, groups: dict[ArtifactKey, list[Trial]]) -> tuple[CautionGroup, ...]:
    """Find every caution in the data, grouped by cause, gravest first."""
    trials, device = bundle.trials, bundle.header.device
    here = device == THIS_MACHINE
    name, doctor = "this machine" if here else device, f"{show_command('rankship', 'doctor', device)} says more."
    refused = [one for one in trials if judge_trial(one)]
    off = find_canary_off(trials)
    disturbed = [one for one in trials if one.round in off or set(BUSY).intersection(doubt_trial(one))]
    unsteady = [one for one, some in groups.items() if any(_distrust_steadiness({one: some}))]
    unknown = dict(_list_unknown(trials))
    return (
        *(CautionGroup(heading=one) for one in _distrust_run(bundle, groups)),
        *_group(
            f"{len(refused)} of {len(trials)} trials are left out of every figure.",
            f"Find out what changed on {name} meanwhile, and measure again.",
            _name_refused(trials),
        ),
        *_group(
            f"{_begin(name)} was busy during {len(disturbed)} of {len(trials)} trials.",
            f"{'Close other programs' if here else 'Stop what else runs there'} and measure again.",
            _name_busy(trials),
        ),
        *_group(
            f"{_begin(name)} did not keep a steady speed.",
            f"Set `governor` and `cool_below_mc` in the inventory. {doctor}",
            _distrust_speed(trials),
        ),
        *_group(
            f"Rounds differ: {len(unsteady)} of {len(groups)} artifacts changed speed.",
            f"Measure on a quiet machine, in {CORRELATION_ROUNDS} rounds or more.",
            (*_distrust_counts(groups), *_distrust_steadiness(groups)),
        ),
        *_group(f"{_begin(name)} does not report its {' and '.join(unknown)}.", doctor, unknown.values()),
    )


def _begin(text: str) -> str:
    """Capitalise "this machine" for the start of a sentence; a device's name stays as it is."""
    return text.replace("this machine", "This machine")


def _group(heading: str, advice: str, details: Iterable[str]) -> Iterable[CautionGroup]:
    """Yield the group, if there are cautions; a single caution is its own heading."""
    found = tuple(details)
    if found:
        several = len(found) > 1
        yield CautionGroup(heading=heading if several else found[0], advice=advice, details=found if several else ())


def _distrust_run(bundle: Bundle, groups: dict[ArtifactKey, list[Trial]]) -> Iterable[str]:
    """Yield cautions about the run itself, each a group of its own."""
    if not bundle.finished:
        yield f"The run is unfinished: {len(bundle.trials)} trials so far."
    if STAND_IN in bundle.header.conditions:
        what = f"The device is a stand-in, {bundle.header.conditions[STAND_IN]}"
        yield f"{what}: its times, temperature, memory and energy say nothing about a real one."
    proven = {one.artifact_sha256 for one in bundle.header.verified}
    for key, trials in groups.items():
        if trials[0].artifact_sha256 not in proven:
            yield f"{key.title} was timed without a proof of parity."
    for one in bundle.header.delegated:
        if one.took_nothing and one.key in groups:
            what = f"{find_facts(one.key).title} takes nothing of {one.key.title}"
            yield f"{what}: its times are those of the processor without it."
    yield from _distrust_gaps(bundle.trials)
    retries = sum(trial.retries for trial in bundle.trials)
    if retries:
        yield f"The link to the device failed and was retried {_times(retries)}; what failed was measured again."


def _name_refused(trials: tuple[Trial, ...]) -> Iterable[str]:
    """Yield a caution for each reason and artifact with trials that do not count."""
    refused: dict[tuple[str, ArtifactKey], set[int]] = {}
    for trial in trials:
        for reason in judge_trial(trial):
            refused.setdefault((reason, trial.key), set()).add(trial.round)
    for (reason, key), rounds in refused.items():
        yield f"Not counted: {name_rounds(rounds)} of {key.title}: {reason} while it was measured."


def _name_busy(trials: tuple[Trial, ...]) -> Iterable[str]:
    """Yield cautions about trials that other work on the device disturbed."""
    yield from _name_doubted(trials, BUSY)
    off = find_canary_off(trials)
    if off:
        yield f"Doubted: {CANARY} in {name_rounds(off)}; no verdict between runs uses them."


def _name_doubted(trials: tuple[Trial, ...], reasons: Collection[str]) -> Iterable[str]:
    """Yield a caution for each reason with trials that count here, but that no verdict between runs may use."""
    doubted: dict[str, set[tuple[int, ArtifactKey]]] = {}
    for trial in trials:
        for reason in (one for one in doubt_trial(trial) if one in reasons):
            doubted.setdefault(reason, set()).add((trial.round, trial.key))
    for reason, which in doubted.items():
        rounds = name_rounds({number for number, _ in which})
        share = f"{len(which)} of {len(trials)} trials ({rounds})"
        yield f"Doubted: {reason} in {share}; no verdict between runs uses them."


def _distrust_counts(groups: dict[ArtifactKey, list[Trial]]) -> Iterable[str]:
    """Yield cautions about the number of rounds."""
    counts = {name: len(trials) for name, trials in groups.items() if len(trials) < count_needed()}
    if counts:
        where = "every artifact" if len(counts) == len(groups) else ", ".join(key.title for key in counts)
        few = f"Too few rounds for an interval: {min(counts.values())} for {where}"
        yield f"{few}; a median at 95 % needs {count_needed()}, so point values stand alone."
    fewest = min(map(len, groups.values()))
    if count_needed() <= fewest < CORRELATION_ROUNDS:
        enough = f"({CORRELATION_ROUNDS} can)"
        yield f"Rounds: {fewest} cannot show whether they are correlated {enough}; intervals assume not."


def _distrust_steadiness(groups: dict[ArtifactKey, list[Trial]]) -> Iterable[str]:
    """Yield cautions about each artifact's times: warm-up, spread between rounds, drift inside a trial."""
    for key, trials in groups.items():
        name = key.title
        cold = {trial.round for trial in trials if not trial.warmed_up}
        if cold:
            share = f"{len(cold)} of {len(trials)} rounds ({name_rounds(cold)})"
            yield f"Warm-up: {name} never reached a steady state in {share}."
        medians = list(median_by_round(trials).values())
        spread, widening = relative_spread(medians), find_widening(medians)
        if spread > _ROUND_SPREAD:
            yield f"Spread: the rounds of {name} differ by {spread:.0%} (interquartile range over median)."
        if widening > _WIDENED:
            yield f"Rounds: those of {name} are correlated, so its interval is × {widening:.1f} wider."
        drifts = {trial.round: relative_drift(trial.samples_ns) for trial in trials}
        drifted = {number: drift for number, drift in drifts.items() if abs(drift) > _TRIAL_DRIFT}
        if drifted:
            worst = max(drifted.values(), key=abs)
            yield f"Drift: {name} changed speed inside {name_rounds(drifted)} (second half {worst:+.0%} at worst)."


def _distrust_gaps(trials: tuple[Trial, ...]) -> Iterable[str]:
    """Yield a caution for each round with a long interruption: its trials are paired, though hours may lie between."""
    rounds: dict[int, list[Trial]] = {}
    for trial in sorted(trials, key=lambda one: one.started_utc):
        rounds.setdefault(trial.round, []).append(trial)
    for number, members in sorted(rounds.items()):
        idle = max((_idle_s(one, following) for one, following in pairwise(members)), default=0)
        if idle > _ROUND_GAP_S:
            yield f"Interrupted: {idle / 60:.0f} minutes lie between two trials of round {number}."


def _idle_s(trial: Trial, following: Trial) -> float:
    """Return the seconds from the end of a trial's inferences to the start of the next trial."""
    busy_ns = trial.load_ns + sum(trial.warmup_ns) + sum(trial.samples_ns)
    begun, next_begun = (datetime.fromisoformat(one.started_utc) for one in (trial, following))
    return (next_begun - begun).total_seconds() - busy_ns / 1e9


def _distrust_speed(trials: tuple[Trial, ...]) -> Iterable[str]:
    """Yield cautions about settings that the device did not take, its governor, and its clock frequency."""
    for phrase in dict.fromkeys(phrase for trial in trials for phrase in trial.conditions.unmet):
        count = sum(phrase in trial.conditions.unmet for trial in trials)
        yield f"Conditions: {phrase} ({count} of {len(trials)} trials)."
    yield from _name_doubted(trials, (FREQUENCY,))
    governors = {state.governor for trial in trials for state in (trial.before, trial.after)}
    others = sorted(governor for governor in governors if governor not in {None, "performance"})
    if others:
        yield f"Governor: {', '.join(others)}, not performance; the clock may follow the load."
    moved = [move for trial in trials if (move := find_frequency_move(trial) or 0) > _FREQUENCY_MOVE]
    if moved:
        yield f"Frequency: moved by up to {max(moved):.0%} between the start and end of {len(moved)} trials."


def _list_unknown(trials: tuple[Trial, ...]) -> Iterable[tuple[str, str]]:
    """Yield each reading about speed that the device does not report, with the caution about it."""
    states = [state for trial in trials for state in (trial.before, trial.after)]
    if any(state.governor is None for state in states):
        yield "governor", "Governor unknown: the device does not report it, so frequency scaling cannot be excluded."
    if any(find_frequency_move(trial) is None for trial in trials):
        yield "clock", "Frequency unknown: the device does not report its clock, so a change of speed would go unseen."
    if any(state.temperature_mc is None for state in states):
        yield "temperature", "Temperature unknown: the device does not report it, so throttling cannot be excluded."


def name_rounds(numbers: Iterable[int]) -> str:
    """Name rounds as `round 3` or `rounds 1, 2, 5`; only the first eight are listed."""
    ordered, most = sorted(numbers), 8
    listed = ", ".join(map(str, ordered[:most])) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
    return f"round {listed}" if len(ordered) == 1 else f"rounds {listed}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
