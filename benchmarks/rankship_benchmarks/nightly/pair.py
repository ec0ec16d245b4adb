"""Two stored files of one case, measured again on one device in the same rounds, and compared by the usual verdict.

    <folder>/before/trials.jsonl, <folder>/after/trials.jsonl     one bundle for each file, none of them a night's run

Rounds go on until the verdict is no longer "unknown" or the last look is reached. A killed pair continues at its first
missing trial.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rankship_benchmarks.bundle.bundle import (
    BUNDLE_FILE,
    Bundle,
    Header,
    append_trial,
    create_bundle,
    open_bundle,
    writing,
)
from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.judge.compare import Rule, Verdict, compare_bundles
from rankship_benchmarks.measure.host_gate import find_inputs
from rankship_benchmarks.measure.pending import Pending, forget_pending, note_pending, read_pending
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import Artifact
from rankship_pipeline.foundation.store import Store
from rankship_targets.client.detached import make_ticket
from rankship_targets.session.manifest import read_manifest
from rankship_targets.session.session import Session
from rankship_targets.trials.request import MeasureRequest

LOOKS = (12, 24, 48)  # rounds after which a verdict is looked for
RULE = Rule(significance=0.01 / len(LOOKS))  # every look is a chance to err
_SIDES = ("before", "after")


@dataclass(frozen=True)
class Bench:
    """Where pairs are measured: the device's session, the store, the results' folder, and the suite's loop."""

    session: Session
    store: Store
    folder: Path
    suite: Suite
    steps: Steps


def measure_pair(bench: Bench, headers: tuple[Header, Header], names: tuple[str, str], key: ArtifactKey) -> Verdict:
    """Measure one case's files of two runs by rounds, and judge the second against the first.

    `names` are the nights', for the folder. What an earlier call measured under the same agent and loop counts.
    """
    made_with = digest({"agent": bench.session.agent_sha256, "suite": digest(bench.suite)})[:8]
    folder = bench.folder / f"{'-'.join(names)}-{made_with}"
    artifacts = [_find(header, key) for header in headers]
    requests = [_push(bench, artifact) for artifact in artifacts]
    for side, header, artifact in zip(_SIDES, headers, artifacts, strict=True):
        if not (folder / side / BUNDLE_FILE).exists():
            create_bundle(folder / side, _describe(header, artifact, f"{folder.name}-{side}"))
    with ExitStack() as held:
        for side in _SIDES:
            held.enter_context(writing(folder / side))
        for rounds in LOOKS:
            _take_rounds(bench, folder, requests, rounds)
            verdict = _judge(folder)
            if verdict.verdict != "unknown":
                break
    return verdict


def _take_rounds(bench: Bench, folder: Path, requests: Sequence[MeasureRequest], rounds: int) -> None:
    """Take every missing trial up to so many rounds; every other round runs backwards, so that drift cancels."""
    done = {side: {trial.round for trial in _open(folder, side).trials} for side in _SIDES}
    planned = [
        (number, side, request)
        for number in range(rounds)
        for side, request in list(zip(_SIDES, requests, strict=True))[:: 1 if number % 2 == 0 else -1]
        if number not in done[side]
    ]
    with bench.steps.track(f"measure {folder.name}", len(planned)) as advance:
        for number, side, request in planned:
            advance(f"round {number + 1}/{rounds}: {side}")
            _take(bench.session, folder / side, replace(request, round=number))


def _take(session: Session, folder: Path, request: MeasureRequest) -> None:
    """Take one trial, or fetch it where a killed process left it running on the device."""
    pending = read_pending(folder)
    if pending is not None and pending.place != (request.round, request.key):
        forget_pending(folder, session)
        pending = None
    if pending is None:
        pending = Pending(round=request.round, key=request.key, ticket=make_ticket())
        note_pending(folder, pending)
    append_trial(folder, session.measure(request, pending.ticket))
    forget_pending(folder, session)


def _judge(folder: Path) -> Verdict:
    (verdict,) = compare_bundles(_open(folder, "before"), _open(folder, "after"), RULE)
    return verdict


def _open(folder: Path, side: str) -> Bundle:
    return open_bundle(folder / side)


def _find(header: Header, key: ArtifactKey) -> Artifact:
    artifact = next(one for one in header.build.artifacts if is_file_of(one, key))
    return replace(artifact, key=key)


def is_file_of(artifact: Artifact, key: ArtifactKey) -> bool:
    """Return whether a file is what a case times, with any delegate; phases of generating are not measured again."""
    return key.phase is None and artifact.key == key.exported


def _push(bench: Bench, artifact: Artifact) -> MeasureRequest:
    path, suite = bench.store.root / artifact.file, bench.suite
    with bench.steps.transfer(f"push {artifact.sha256[:12]}") as on_progress:
        remote = bench.session.push(path, read_manifest(path).verified, on_progress=on_progress)
        inputs = tuple(bench.session.push_file(one) for one in find_inputs((artifact,), bench.store))
    return MeasureRequest(
        round=0,
        key=artifact.key,
        artifact=remote,
        artifact_sha256=artifact.sha256,
        inputs=inputs,
        threads=suite.threads,
        min_samples=suite.min_samples,
        min_duration_ms=suite.min_duration_ms,
        max_warmup_ms=suite.max_warmup_ms,
        timeout_s=suite.timeout_s,
    )


def _describe(header: Header, artifact: Artifact, run_id: str) -> Header:
    """Make a bundle's header from the night's: of this file alone; both are measured under the conditions of now."""
    file = replace(artifact, key=artifact.key.exported)
    return replace(
        header,
        run_id=run_id,
        build=replace(header.build, artifacts=(file,), heads=(), shapes=()),
        verified=(),
        verified_on_device=(),
        rounds=LOOKS[-1],
        conditions={},
        canary=None,
        energy=None,
    )
