"""Judges one device's night: each case against the last night that counts, and the steps found that night."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.judge.compare import compare_bundles
from rankship_benchmarks.judge.compare_energy import compare_energies
from rankship_benchmarks.judge.summary import TIMES, summarise
from rankship_benchmarks.nightly.explain import Evidence, explain_verdict, find_step_runs
from rankship_benchmarks.nightly.histories import Case
from rankship_benchmarks.nightly.records import CaseVerdict, DeviceNight, NightRecord
from rankship_benchmarks.stats.steps import Night, Step, find_steps
from rankship_pipeline.foundation import errors
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import BuildError, InputError, MeasurementError, RankshipError, TargetError

# Gravest first: a night with a worse case exits with 1, whatever else went wrong.
_GRAVITY = (1, BuildError.exit_code, TargetError.exit_code, MeasurementError.exit_code, InputError.exit_code)


def judge_device(evidence: Evidence, one: DeviceNight, histories: Mapping[Case, Sequence[Night]]) -> DeviceNight:
    """Return the device's record with its cases judged and worse ones explained; a gap if no case counts.

    The last night of `evidence` is tonight.
    """
    try:
        tonight = open_bundle(evidence.results / str(one.run))
        summarise(tonight)  # raises if the run must not be used at all
    except (MeasurementError, InputError) as failure:
        return replace(one, gap=str(failure), error=type(failure).__name__)
    mine = {
        case: night
        for case, nights in histories.items()
        if case.device == one.measured_on and (night := _find_tonight(nights, one)) is not None
    }
    gaps = {night.gap for night in mine.values()}
    if gaps and None not in gaps:
        return replace(one, gap="; ".join(sorted(filter(None, gaps))), error="MeasurementError")
    folder, baseline = _find_baseline(evidence, one, tonight)
    verdicts = _compare(baseline, tonight)
    pair = (folder, str(one.run))
    judged = [_judge_case(evidence, case, histories[case], night, verdicts, pair) for case, night in mine.items()]
    judged_energies = judge_energies(baseline, tonight)
    of_energy = {case.key: case for case in judged_energies}
    energies = [_explain(evidence, case, pair, of_energy) for case in judged_energies]
    return replace(one, cases=tuple(judged), energies=tuple(energies))


def judge_energies(baseline: Bundle | None, tonight: Bundle) -> tuple[CaseVerdict, ...]:
    """Judge tonight's energies by the rules for times; empty if the suite asks for none or none was metered.

    `baseline` is the last night that counts, None if there is none: then, and if the two must not be compared, every
    case is unknown.
    """
    if tonight.header.energy is None or not tonight.metered:
        return ()
    if baseline is None:
        return _judge_unknown_energies(tonight, "no earlier night counts")
    try:
        compare_bundles(baseline, tonight)  # raises if conditions differ; compare_energies checks only the meters
    except MeasurementError as failure:
        return _judge_unknown_energies(tonight, f"{type(failure).__name__}: {failure}")
    verdicts = compare_energies(baseline, tonight)
    if not verdicts:
        return _judge_unknown_energies(tonight, "the last night that counts has no energy")
    return tuple(
        CaseVerdict(key=one.key, verdict=one.verdict, reason=one.reason, ratio=one.ratio)
        for one in verdicts
        if one.key.variant != "canary"
    )


def state_exit(night: NightRecord) -> int:
    """Return the night's exit status: 1 if a case is worse; else that of the gravest error of a device."""
    codes = {1 for one in night.devices for case in (*one.cases, *one.energies) if case.verdict == "worse"}
    for one in night.devices:
        kind = getattr(errors, one.error or "", None)
        if isinstance(kind, type) and issubclass(kind, RankshipError):
            codes.add(kind.exit_code)
    return next((code for code in _GRAVITY if code in codes), 0)


def _compare(baseline: Bundle | None, tonight: Bundle) -> dict[ArtifactKey, CaseVerdict]:
    """Compare with the last night that counts; every case is unknown if there is none, or its conditions differ."""
    keys = dict.fromkeys(trial.key for trial in tonight.trials)
    if baseline is None:
        return {key: _not_compared(key, "no earlier night counts") for key in keys}
    try:
        verdicts = compare_bundles(baseline, tonight)
    except MeasurementError as failure:
        return {key: _not_compared(key, f"{type(failure).__name__}: {failure}") for key in keys}
    return {
        one.key: CaseVerdict(key=one.key, verdict=one.verdict, reason=one.reason, ratio=one.ratio) for one in verdicts
    }


def _find_baseline(evidence: Evidence, one: DeviceNight, tonight: Bundle) -> tuple[str, Bundle | None]:
    """Find the last night's run that counts: its folder's name and the run; "" and None if there is none."""
    for earlier in reversed(evidence.nights[:-1]):
        for other in earlier.devices:
            if other.measured_on == one.measured_on and other.run and other.gap is None:
                try:
                    bundle = open_bundle(evidence.results / other.run)
                except InputError:
                    continue  # deleted or damaged since: try the night before it
                if bundle.header.recipe == tonight.header.recipe:
                    return other.run, bundle
    return "", None


def _judge_case(
    evidence: Evidence,
    case: Case,
    nights: Sequence[Night],
    tonight: Night,
    verdicts: Mapping[ArtifactKey, CaseVerdict],
    pair: tuple[str, str],
) -> CaseVerdict:
    """Judge a case and explain it if it is worse: against `pair`'s first run, or across the step that was found."""
    judged = verdicts.get(case.key) or _not_compared(case.key, "not compared")
    if tonight.gap is not None:
        judged = _not_compared(case.key, tonight.gap)
    steps = [step for step in find_steps(nights) if step.found_run_id == tonight.run_id]
    if not steps:
        return _explain(evidence, judged, pair, verdicts)
    step = steps[-1]
    if judged.verdict not in {"same", "unknown"}:
        return _explain(evidence, replace(judged, step=show_step(step)), pair, verdicts)
    across = find_step_runs(nights, step)
    told = replace(judged, verdict=step.verdict, step=show_step(step))
    return told if across is None else _explain(evidence, told, across, None)


def _explain(
    evidence: Evidence, case: CaseVerdict, runs: tuple[str, str], verdicts: Mapping[ArtifactKey, CaseVerdict] | None
) -> CaseVerdict:
    """Explain a worse case, and leave any other as it is."""
    if case.verdict != "worse":
        return case
    outcomes = None if verdicts is None else {key: one.verdict for key, one in verdicts.items()}
    return explain_verdict(evidence, case, runs, outcomes)


def show_step(step: Step) -> str:
    """Describe a step: since when, and the ratio of the levels."""
    low, high = step.ratio.low, step.ratio.high
    span = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{step.verdict} since {step.started_utc[:10]}: {TIMES} {step.ratio.value:.3f}{span}"


def _find_tonight(nights: Sequence[Night], one: DeviceNight) -> Night | None:
    return next((night for night in reversed(nights) if night.run_id == one.run), None)


def _not_compared(key: ArtifactKey, reason: str) -> CaseVerdict:
    return CaseVerdict(key=key, verdict="unknown", reason=reason)


def _judge_unknown_energies(tonight: Bundle, reason: str) -> tuple[CaseVerdict, ...]:
    keys = dict.fromkeys(one.trial.key for one in tonight.metered)
    return tuple(_not_compared(key, reason) for key in keys if key.variant != "canary")
