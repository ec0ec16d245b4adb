"""Earlier runs of the same recipe, device, suite, agent and conditions in the results folder, as histories to draw."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rankship_benchmarks.bundle.bundle import BUNDLE_FILE, Bundle, Header, find_cases, open_bundle
from rankship_benchmarks.judge.summary import group_trials
from rankship_benchmarks.judge.validity import keep_valid
from rankship_benchmarks.stats.estimates import median_by_round
from rankship_benchmarks.stats.steps import Night
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import InputError

MOST = 30  # runs, the newest


def list_histories(folder: Path, bundle: Bundle) -> Mapping[ArtifactKey, tuple[Night, ...]]:
    """List each case's history: the finished runs before this one, then this one; empty if it is the first.

    Only the build may differ between the runs. A run without a valid trial of a case is a gap in that case's history.
    """
    before: list[tuple[str, Bundle]] = []
    for path in folder.resolve().parent.glob(f"*/{BUNDLE_FILE}"):
        with suppress(InputError):  # another run's bundle is damaged: leave it out
            other = open_bundle(path.parent)
            if other.finished and _is_before(other.header, bundle.header):
                before.append((other.header.created_utc, other))
    runs = [one for _, one in sorted(before, key=lambda pair: pair[0])][-MOST:]
    if not runs:
        return {}
    everything = [*runs, bundle]
    built = {one.key for one in bundle.header.build.artifacts}
    cases = dict.fromkeys(key for run in everything for key in find_cases(run) if key.exported in built)
    return {key: tuple(_read_case(run, key) for run in everything) for key in cases}


def _is_before(other: Header, header: Header) -> bool:
    same = all(
        getattr(other, name) == getattr(header, name) for name in ("recipe", "device", "suite_sha256", "conditions")
    )
    return same and other.run_id != header.run_id and other.created_utc <= header.created_utc


def _read_case(run: Bundle, key: ArtifactKey) -> Night:
    trials = group_trials(keep_valid(run.trials)).get(key, [])
    rounds = tuple(median_by_round(trials).values())
    gap = None if rounds else "no trial that counts"
    return Night(run_id=run.header.run_id, started_utc=run.header.created_utc, rounds_ns=rounds, gap=gap)
