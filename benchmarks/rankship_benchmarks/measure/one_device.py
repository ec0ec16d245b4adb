"""Measures a build on one device: interleaved rounds of every artifact, each trial appended to a bundle at once."""

import platform
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rankship_benchmarks.bundle.bundle import (
    STAND_IN,
    TIMED_TOKENS,
    Header,
    append_trial,
    create_bundle,
    find_unfinished,
    finish_bundle,
    open_bundle,
    writing,
)
from rankship_benchmarks.bundle.suite import Suite, plan_energy
from rankship_benchmarks.measure.aggregates import take_aggregates
from rankship_benchmarks.measure.cases import list_cases, make_inputs
from rankship_benchmarks.measure.continuations import continue_prompt
from rankship_benchmarks.measure.delegated import look_at_delegates
from rankship_benchmarks.measure.device_accuracy import examine_device
from rankship_benchmarks.measure.device_gate import list_unproven, verify_on_device
from rankship_benchmarks.measure.energy_rounds import measure_energy
from rankship_benchmarks.measure.pending import Pending, forget_pending, note_pending, read_pending
from rankship_benchmarks.measure.profiles import profile_run
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline import __version__
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import Artifact, Build, Verified
from rankship_pipeline.foundation.units import show_bytes
from rankship_targets.client.detached import make_ticket
from rankship_targets.devices.device import Device
from rankship_targets.devices.quarantine import watching
from rankship_targets.session.metered import check_meter, require_meter
from rankship_targets.session.session import Session, open_session
from rankship_targets.trials.request import MeasureRequest


def measure_build(plan: RunPlan, device: Device, steps: Steps) -> Path:
    """Push verified artifacts, verify them there, time them in fresh processes by rounds; returns the bundle's folder.

    ParityFailed, before anything is timed, if the device's own runtime does not compute within the limits. An
    unfinished bundle of the same build, suite, agent and device is continued at its first missing trial, if the probe
    of the device has not changed; else a new bundle is begun. If an earlier process died, its last trial went on on
    the device, and the result is fetched.
    """
    build, store, suite, canary = plan.build, plan.store, plan.suite, plan.canary
    timed = build if canary is None else replace(build, artifacts=(*build.artifacts, canary))
    energy = plan_energy(suite.energy, require_meter(device)) if suite.energy else None
    with watching(device), open_session(device, on_news=steps.note, signers=plan.signers) as session:
        if energy:
            check_meter(session)
        with steps.transfer(f"push to {device.name}") as on_progress:
            remote = {
                proof.artifact_sha256: session.push(store.root / artifact.file, proof, on_progress=on_progress)
                for artifact, proof in zip(timed.files, plan.verified, strict=True)
            }
            cases = list_cases(timed.artifacts, suite)
            inputs: dict[ArtifactKey, tuple[str, ...]] = {}
            for case in cases:
                with TemporaryDirectory() as made:
                    paths = make_inputs(case, store, suite.generation, Path(made))
                    inputs[case.key] = tuple(session.push_file(path, on_progress=on_progress) for path in paths)
        make_request = partial(_make_request, remote, inputs, suite)
        wanted = list_unproven(timed.files, cases, device)
        on_device = verify_on_device(wanted, store, session, remote, plan.limits, suite.threads, steps)
        delegated = look_at_delegates(cases, make_request, store, session, steps)
        header = _describe(build, (tuple(plan.verified), on_device), device, suite, session)
        header = replace(header, canary=canary, energy=energy, delegated=delegated)
        folder = _find_or_create(header, plan.results, session, steps)
        with writing(folder):
            _run_rounds(folder, cases, make_request, suite, session, steps)
            if suite.energy:
                planned = list(plan_rounds(cases, suite.energy.rounds))
                measure_energy(folder, planned, make_request, suite.energy, session, steps)
            take_aggregates(folder, build.artifacts, make_request, suite, session, steps)
            examine_device(folder, cases, plan, remote, session, steps)
            if plan.profile:
                profiled = [one for one in build.artifacts if one.generation is None]
                profile_run(folder, [make_request(0, one) for one in profiled], session, steps)
            if plan.prompt:
                continue_prompt(folder, build, remote, plan.prompt, suite.threads, session, steps)
            finish_bundle(folder)
    return folder


def _find_or_create(header: Header, results: Path, session: Session, steps: Steps) -> Path:
    folder = find_unfinished(results, header.suite_sha256, header.build_sha256, header.device)
    if folder is not None:
        begun = open_bundle(folder).header
        before = begun.conditions
        changed = [name for name, value in header.conditions.items() if before.get(name) != value]
        changed += ["the canary"] if begun.canary != header.canary else []
        changed += ["the meter"] if begun.energy != header.energy else []
        changed += ["what a delegate takes"] if begun.delegated != header.delegated else []
        changed += ["the proof on the device"] if begun.verified_on_device != header.verified_on_device else []
        if not changed:
            steps.note(f"continuing {folder.name}")
            return folder
        steps.note(f"{folder.name} stays unfinished: {', '.join(changed)} changed since; a new run begins")
        forget_pending(folder, session)
    folder = results / header.run_id
    create_bundle(folder, header)
    return folder


def plan_rounds(artifacts: Sequence[Artifact], rounds: int) -> Iterator[tuple[int, Artifact]]:
    """Yield every artifact once per round; every other round runs backwards, so that drift within a round cancels."""
    for number in range(rounds):
        for artifact in artifacts if number % 2 == 0 else reversed(artifacts):
            yield number, artifact


def _run_rounds(
    folder: Path,
    artifacts: Sequence[Artifact],
    make_request: Callable[[int, Artifact], MeasureRequest],
    suite: Suite,
    session: Session,
    steps: Steps,
) -> None:
    done = {(trial.round, trial.key) for trial in open_bundle(folder).trials}
    wanted = [
        (number, artifact)
        for number, artifact in plan_rounds(artifacts, suite.rounds)
        if (number, artifact.key) not in done
    ]
    pending = read_pending(folder)
    if pending is not None and pending.place in done:
        forget_pending(folder, session)  # the last writer died after it appended the trial
        pending = None
    with steps.track(f"measure on {session.device.name}", len(wanted)) as advance:
        for number, artifact in wanted:
            advance(f"round {number + 1}/{suite.rounds}: {artifact.key.title}")
            if pending is None or pending.place != (number, artifact.key):
                pending = Pending(round=number, key=artifact.key, ticket=make_ticket())
                note_pending(folder, pending)
            append_trial(folder, session.measure(make_request(number, artifact), pending.ticket))
            forget_pending(folder, session)  # only now: until here the device has the only copy


def _make_request(
    remote: Mapping[str, str],
    inputs: Mapping[ArtifactKey, tuple[str, ...]],
    suite: Suite,
    number: int,
    artifact: Artifact,
) -> MeasureRequest:
    """Make the request for one trial; `remote` has paths on the device by SHA-256, `inputs` by the case's key."""
    return MeasureRequest(
        round=number,
        key=artifact.key,
        artifact=remote[artifact.sha256],
        artifact_sha256=artifact.sha256,
        inputs=inputs.get(artifact.key, ()),  # a program that has inputs of its own needs none
        threads=suite.threads,
        min_samples=suite.generation.min_prompts if artifact.key.phase == "prefill" else suite.min_samples,
        min_duration_ms=suite.min_duration_ms,
        max_warmup_ms=suite.max_warmup_ms,
        timeout_s=suite.timeout_s,
        generation=artifact.generation,
    )


def _describe_tokens(suite: Suite) -> str:
    choice = suite.generation
    lengths = ", ".join(map(str, sorted(set(choice.prompt_tokens))))
    loops = f"{choice.min_prompts} prompts or {suite.min_samples} tokens"
    return f"prompts of {lengths}; {choice.new_tokens} after the shortest, then again; {loops} at least"


def _describe(
    build: Build,
    proofs: tuple[tuple[Verified, ...], tuple[Verified, ...]],
    device: Device,
    suite: Suite,
    session: Session,
) -> Header:
    """Make a run's header; `proofs` are the host's and the device's."""
    probe, now = session.probe(), datetime.now(UTC)
    formats = {artifact.key.format for artifact in build.artifacts}
    runtimes = {f"{name} runtime": " ".join(probe.runtimes.get(name) or ("none",)) for name in sorted(formats)}
    return Header(
        run_id=f"{build.recipe}-{device.name}-{now.strftime('%Y%m%dT%H%M%SZ')}-{secrets.token_hex(2)}",
        created_utc=now.isoformat(timespec="seconds"),
        suite_sha256=digest({"suite": digest(suite), "agent": session.agent_sha256, "code": __version__}),
        recipe=build.recipe,
        recipe_sha256=build.recipe_sha256,
        build_sha256=digest(build),
        device=device.name,
        build=build,
        verified=proofs[0],
        rounds=suite.rounds,
        conditions={
            "processor": probe.cpu_model or "model unknown",
            "cores": str(probe.cpu_count),
            "memory": show_bytes(probe.memory_bytes) if probe.memory_bytes else "unknown",
            "architecture": probe.machine,
            "kernel": probe.kernel,
            "python": probe.python,
            **runtimes,
            **({} if device.twin is None else {STAND_IN: f"emulated, for a {device.twin}"}),
            "host": f"{platform.system()} {platform.release()} {platform.machine()}",
            "timed loop": f"{suite.min_samples} inferences and {suite.min_duration_ms} ms at least, in a fresh process",
            **({TIMED_TOKENS: _describe_tokens(suite)} if any(one.generation for one in build.artifacts) else {}),
        },
        rankship_version=__version__,
        verified_on_device=proofs[1],
    )
