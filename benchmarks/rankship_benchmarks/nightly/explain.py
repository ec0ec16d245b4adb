"""Explains worse cases: which two nights to look at, and what differs between them, from their own records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankship_benchmarks.bundle.bundle import Bundle, open_bundle
from rankship_benchmarks.judge.changes import Explanation, explain_case
from rankship_benchmarks.judge.compare import compare_bundles
from rankship_benchmarks.nightly.moved_operators import find_moves
from rankship_benchmarks.nightly.records import CaseVerdict, NightRecord
from rankship_benchmarks.nightly.repository import Commit, list_commits
from rankship_benchmarks.stats.steps import Night, Step
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.errors import InputError, MeasurementError


@dataclass(frozen=True)
class Evidence:
    """Where to look: the results folder, every night up to this one, and the user's repository (None: not given)."""

    results: Path
    nights: Sequence[NightRecord]
    repository: Path | None = None

    def find_commit(self, run: str) -> Commit | None:
        """Find the commit of the night that a run belongs to."""
        return next((night.commit for night in self.nights for one in night.devices if one.run == run), None)


def explain_verdict(
    evidence: Evidence, case: CaseVerdict, runs: tuple[str, str], outcomes: Mapping[ArtifactKey, str] | None = None
) -> CaseVerdict:
    """Return a worse case with its explanation; a run that is gone leaves the case as it is."""
    try:
        return replace(case, why=explain_runs(evidence, runs, case.key, outcomes))
    except InputError:
        return case


def explain_runs(
    evidence: Evidence, runs: tuple[str, str], key: ArtifactKey, outcomes: Mapping[ArtifactKey, str] | None = None
) -> Explanation:
    """List what differs between two runs for one case, with what lies beside the bundles: profiles and commits.

    `runs` are their folders' names. `outcomes` are the verdicts on the cases of these runs, compared here if None.
    InputError if a run cannot be read.
    """
    before, after = (evidence.results / run for run in runs)
    baseline, candidate = open_bundle(before), open_bundle(after)
    why = explain_case(baseline, candidate, key, _compare(baseline, candidate) if outcomes is None else outcomes)
    operators, no_operators = find_moves(before, after, key)
    commits = list_commits(evidence.repository, *(evidence.find_commit(run) for run in runs))
    return replace(why, operators=operators, no_operators=no_operators, commits=commits)


def find_step_runs(nights: Sequence[Night], step: Step) -> tuple[str, str] | None:
    """Return the runs on both sides of a step: the last that counts before it, and its first; None without both."""
    counted = [night.run_id for night in nights if night.rounds_ns]
    place = counted.index(step.run_id) if step.run_id in counted else 0
    return (counted[place - 1], counted[place]) if place else None


def _compare(baseline: Bundle, candidate: Bundle) -> dict[ArtifactKey, str]:
    try:
        return {one.key: one.verdict for one in compare_bundles(baseline, candidate)}
    except MeasurementError:
        return {}
