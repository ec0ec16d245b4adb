"""What one night says of a device's energy: each case that a meter watched, against the last night that counts."""

from rankship_benchmarks.bundle.bundle import Bundle
from rankship_benchmarks.judge.compare import compare_bundles
from rankship_benchmarks.judge.compare_energy import compare_energies
from rankship_benchmarks.nightly.records import CaseVerdict
from rankship_pipeline.foundation.errors import MeasurementError


def judge_energies(baseline: Bundle | None, tonight: Bundle) -> tuple[CaseVerdict, ...]:
    """Judge tonight's energies by the rules for times; empty where no energy was asked for or none was metered.

    `baseline` is the last night that counts, None where there is none: then, and where the two must not be compared,
    every case is unknown.
    """
    if tonight.header.energy is None or not tonight.metered:
        return ()
    if baseline is None:
        return _know_nothing(tonight, "no earlier night counts")
    try:
        compare_bundles(baseline, tonight)  # refuses what is unlike, of which meters know nothing
    except MeasurementError as failure:
        return _know_nothing(tonight, f"{type(failure).__name__}: {failure}")
    verdicts = compare_energies(baseline, tonight)
    if not verdicts:
        return _know_nothing(tonight, "the last night that counts has no energy")
    return tuple(
        CaseVerdict(key=one.key, verdict=one.word, reason=one.reason, ratio=one.ratio)
        for one in verdicts
        if one.key.variant != "canary"
    )


def _know_nothing(tonight: Bundle, reason: str) -> tuple[CaseVerdict, ...]:
    keys = dict.fromkeys(one.trial.key for one in tonight.metered)
    return tuple(CaseVerdict(key=key, verdict="unknown", reason=reason) for key in keys if key.variant != "canary")
