"""Interleaved rounds of every artifact of a build on one device, appended to a bundle as they come."""

import platform
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rankship_benchmarks.gate import find_inputs
from rankship_benchmarks.results import (
    Header,
    append_trial,
    create_bundle,
    find_unfinished,
    finish_bundle,
    open_bundle,
    writing,
)
from rankship_benchmarks.suite import Suite
from rankship_pipeline import __version__
from rankship_pipeline.codec import digest
from rankship_pipeline.files import hash_file
from rankship_pipeline.progress import Steps
from rankship_pipeline.records import Artifact, Build, Verified
from rankship_targets.device import Device
from rankship_targets.session import AGENT, MeasureRequest, Session, open_session


def measure_build(
    build: Build, verified: Sequence[Verified], root: Path, device: Device, suite: Suite, results: Path, steps: Steps
) -> Path:
    """Push what is verified, time it in fresh processes round by round, and return the finished bundle's folder.

    An unfinished bundle of the same build, suite, agent and device is continued at its first missing trial.
    """
    suite_sha256 = digest({"suite": digest(suite), "agent": hash_file(AGENT), "code": __version__})
    build_sha256 = digest(build)
    folder = find_unfinished(results, suite_sha256, build_sha256, device.name)
    with open_session(device) as session:
        with steps.step(f"push to {device.name}"):
            remote = {
                proof.artifact_sha256: session.push(root / artifact.file, proof)
                for artifact, proof in zip(build.artifacts, verified, strict=True)
            }
            inputs = tuple(session.push_file(path) for path in find_inputs(build.artifacts, root))
        if folder is None:
            folder = results / _name_run(build, device)
            create_bundle(folder, _describe(folder.name, build, verified, device, suite, suite_sha256, session))
        else:
            steps.note(f"continuing {folder.name}")
        with writing(folder):
            _run_rounds(folder, build, remote, inputs, suite, session, steps)
            finish_bundle(folder)
    return folder


def plan_rounds(artifacts: Sequence[Artifact], rounds: int) -> Iterator[tuple[int, Artifact]]:
    """Every artifact once per round; every other round runs backwards, so that drift within a round cancels too."""
    for number in range(rounds):
        for artifact in artifacts if number % 2 == 0 else reversed(artifacts):
            yield number, artifact


def _run_rounds(
    folder: Path,
    build: Build,
    remote: dict[str, str],
    inputs: tuple[str, ...],
    suite: Suite,
    session: Session,
    steps: Steps,
) -> None:
    done = {(trial.round, trial.variant, trial.format) for trial in open_bundle(folder).trials}
    wanted = [
        (number, artifact)
        for number, artifact in plan_rounds(build.artifacts, suite.rounds)
        if (number, artifact.variant, artifact.format) not in done
    ]
    with steps.track(f"measure on {session.device.name}", len(wanted)) as advance:
        for number, artifact in wanted:
            advance(f"round {number + 1}/{suite.rounds}: {artifact.variant} {artifact.format}")
            append_trial(
                folder,
                session.measure(
                    MeasureRequest(
                        round=number,
                        variant=artifact.variant,
                        format=artifact.format,
                        artifact=remote[artifact.sha256],
                        artifact_sha256=artifact.sha256,
                        inputs=inputs,
                        threads=suite.threads,
                        min_samples=suite.min_samples,
                        min_duration_ms=suite.min_duration_ms,
                        max_warmup_ms=suite.max_warmup_ms,
                    )
                ),
            )


def _name_run(build: Build, device: Device) -> str:
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{build.recipe}-{device.name}-{now}-{secrets.token_hex(2)}"


def _describe(
    run_id: str,
    build: Build,
    verified: Sequence[Verified],
    device: Device,
    suite: Suite,
    suite_sha256: str,
    session: Session,
) -> Header:
    probe = session.probe()
    conditions = {
        "device python": probe.python,
        "device machine": probe.machine,
        "device kernel": probe.kernel,
        "device": probe.cpu_model or "model unknown",
        "device cores": str(probe.cpu_count),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
        "timed loop": f"at least {suite.min_samples} inferences and {suite.min_duration_ms} ms, one fresh process each",
    }
    return Header(
        run_id=run_id,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        suite_sha256=suite_sha256,
        recipe=build.recipe,
        recipe_sha256=build.recipe_sha256,
        build_sha256=digest(build),
        device=device.name,
        build=build,
        verified=tuple(verified),
        rounds=suite.rounds,
        conditions=conditions,
        rankship_version=__version__,
    )
