"""The parity gate on the device: before timing, each artifact's outputs there are compared with torch's.

The device's own runtime computes them. A proof is kept in the user's state folder and is valid as long as the artifact,
its inputs, the limits, the agent and the device's runtime and interpreter stay the same.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rankship_pipeline.export.artifact import find_proofs
from rankship_pipeline.export.parity import verify_artifact
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError, ParityFailed
from rankship_pipeline.foundation.files import hash_file, write_atomic
from rankship_pipeline.foundation.records import Artifact, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.foundation.toolchain import hash_code
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.devices.device import THIS_MACHINE, Device, user_folder
from rankship_targets.session.runner import DeviceRunner
from rankship_targets.session.session import Session
from rankship_targets.trials.events import Probe


def list_unproven(files: Sequence[Artifact], cases: Sequence[Artifact], device: Device) -> list[Artifact]:
    """List what is to be proven on a device: every file, and every case whose runtime is asked for a delegate.

    On this machine only the latter: the host's gate has proven the files, by the same agent under the same interpreter.
    """
    asked = {replace(one.key, part=one.key.exported.part): one for one in cases if one.key.asked is not None}
    own = [] if device.name == THIS_MACHINE else files
    return [*own, *(replace(one, key=key) for key, one in asked.items())]


def verify_on_device(
    artifacts: Sequence[Artifact],
    store: Store,
    session: Session,
    pushed: Mapping[str, str],
    limits: ParityChoice,
    threads: int,
    steps: Steps,
) -> tuple[Verified, ...]:
    """Verify artifacts on the device, each as its key's delegate computes it.

    `pushed` maps SHA-256 to the path on the device. ParityFailed names the device; a failure to reach it is a
    TargetError.
    """
    if not artifacts:
        return ()
    probe = session.probe()
    proofs = []
    for artifact in artifacts:
        runner = DeviceRunner(session, threads, pushed, artifact.key.asked)
        path, (timed, *_) = find_proofs(artifact, store)
        known = {
            "artifact": artifact.sha256,
            "inputs": [hash_file(one) for one in (*timed.inputs, *timed.expected)],
            "limits": digest(limits),
            "threads": threads,
            "agent": session.agent_sha256,
            "code": hash_code(),
            "device": _identify(session.device),
            "system": [probe.machine, probe.cpu_model, session.device.python, probe.python, probe.numpy],
            "runtime": probe.runtimes.get(artifact.key.format),
            **({} if artifact.key.asked is None else {"delegate": artifact.key.asked}),
        }
        target = user_folder("XDG_STATE_HOME", ".local/state") / "rankship" / "proofs" / f"{digest(known)[:32]}.json"
        proof = _read(target, artifact)
        if proof is None:
            with steps.step(f"verify {artifact.key.title} on {session.device.name}"):
                try:
                    proof = verify_artifact(artifact, path, timed.inputs, timed.expected, runner, limits, timed.rows)
                except ParityFailed as failure:
                    raise _say_where(failure, session.device, probe, artifact) from None
            write_atomic(target, encode(proof).encode(), mode=0o600)
        proofs.append(proof)
    return tuple(proofs)


def _identify(device: Device) -> list[object]:
    return [device.name, device.transport, device.host, device.serial, device.fingerprint, device.twin]


def _read(target: Path, artifact: Artifact) -> Verified | None:
    """Read a kept proof; None if there is none, it is not whole, or it is another file's."""
    with suppress(FileNotFoundError, InputError):
        proof = decode(Verified, target.read_bytes(), where=str(target))
        return proof if proof.artifact_sha256 == artifact.sha256 else None
    return None


def _say_where(failure: ParityFailed, device: Device, probe: Probe, artifact: Artifact) -> ParityFailed:
    runtime = " ".join(probe.runtimes.get(artifact.key.format) or (f"no runtime for {artifact.key.format}",))
    message = f"on {device.name} ({runtime}, {probe.machine}): {failure}"
    hint = "nothing was timed. The host's runtime computes it correctly: install the same version on the device"
    return ParityFailed(
        message, hint=f"{hint} ({show_command('rankship', 'kit', 'build', device.name)}), or see what [parity] allows"
    )
