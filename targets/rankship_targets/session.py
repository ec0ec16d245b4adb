"""A working session on one device: connected, held by a lease, with the agent in place."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from rankship_pipeline.errors import BuildError, CommandFailed, Lacks, ManifestRefused, TargetError
from rankship_pipeline.files import hash_file
from rankship_pipeline.records import Format, Variant, Verified, record
from rankship_targets.agent_file import find_agent
from rankship_targets.client import call_agent, pick
from rankship_targets.device import Device
from rankship_targets.events import Done, Event, Loaded, Opened, Probe, Samples, State, Warmed
from rankship_targets.lease import STALE_S, Lease, describe_owner
from rankship_targets.link import Link
from rankship_targets.manifest import SUFFIX as MANIFEST_SUFFIX
from rankship_targets.manifest import check_pushed, manifest_path, read_manifest
from rankship_targets.transport import (
    NOT_EXECUTABLE,
    NOT_FOUND,
    STEP_TIMEOUT_S,
    Transport,
    copy_verified,
    explain_failure,
    hash_remote,
    open_transport,
    run_checked,
)
from rankship_targets.trial import RuntimeReading, Trial

SUFFIXES: dict[Format, str] = {"onnx": "onnx", "tflite": "tflite", "executorch": "pte"}
INFER_TIMEOUT_S = 600.0
OLDEST_PYTHON = [3, 9]
# Makes the working folder and says where it is: from then on every path is absolute.
_GREETING = (
    "import json, os, sys; folder = os.path.abspath(sys.argv[1]); os.makedirs(folder, exist_ok=True); "
    "print(json.dumps([list(sys.version_info[:2]), folder]))"
)


@record
class MeasureRequest:
    """What to time: a pushed artifact, the inputs whose first sample it gets, and for how long.

    The timed loop ends when both `min_samples` and `min_duration_ms` are reached; the warm-up when it is steady or
    `max_warmup_ms` are spent.
    """

    round: int
    variant: Variant
    format: Format
    artifact: str
    artifact_sha256: str
    inputs: tuple[str, ...]
    threads: int
    min_samples: int
    min_duration_ms: int
    max_warmup_ms: int
    timeout_s: float = 900.0


@contextmanager
def open_session(
    device: Device, *, connect: Callable[[Device], Transport] = open_transport, lease_stale_s: int = STALE_S
) -> Iterator["Session"]:
    """Connect, take the lease and put the agent in place; the lease is given back on every way out."""
    link = Link(device, connect)
    try:
        workdir = link.call(lambda transport: _greet(transport, device))
        lease = Lease(device=device, folder=f"{workdir}/lease", owner=describe_owner(), stale_s=lease_stale_s)
        link.call(lease.take)
        try:
            yield Session(device, link, lease, workdir)
        finally:
            with suppress(TargetError):  # where the way to it is gone, the lease goes stale by itself
                link.call(lease.release)
    finally:
        link.close()


class Session:
    """Everything that may be done with a device that is held; made by `open_session`."""

    def __init__(self, device: Device, link: Link, lease: Lease, workdir: str) -> None:
        self.device = device
        self.agent_sha256 = hash_file(find_agent())
        self._link = link
        self._lease = lease
        self._workdir = workdir
        self._verified: dict[str, str] = {}
        self._agent = self._copy(find_agent(), self.agent_sha256, f"agents/{self.agent_sha256}.pyz")

    def probe(self) -> Probe:
        """Ask the agent what the device is and has."""
        request = {"command": "probe", "workdir": self._workdir}
        return pick(self._link.call(lambda link: self._ask(link, request, STEP_TIMEOUT_S)), Probe, self.device)

    def push(self, artifact: Path, verified: Verified) -> str:
        """Copy an artifact that was proven and signed, and no other; gives its path on the device.

        BuildError where it is not the file that was proven, ManifestRefused where this user did not sign that.
        """
        sha256 = hash_file(artifact)
        if sha256 != verified.artifact_sha256:
            message = f"{artifact} has SHA-256 {sha256}, verified was {verified.artifact_sha256}: nothing was pushed"
            raise BuildError(message, hint="the file changed after `rankship verify`: build and verify again")
        manifest = read_manifest(artifact)
        if manifest.verified != verified:
            message = f"{manifest_path(artifact)} is signed for another proof: nothing was pushed"
            raise ManifestRefused(message, hint="`rankship verify` with the same recipe signs anew")
        name = f"artifacts/{sha256}/model.{SUFFIXES[verified.format]}"
        remote = self._copy(artifact, sha256, name)
        note = manifest_path(artifact)
        self._copy(note, hash_file(note), name + MANIFEST_SUFFIX)
        self._link.call(lambda transport: check_pushed(transport, remote, manifest))
        self._verified[remote] = sha256
        return remote

    def push_file(self, path: Path) -> str:
        """Copy any other file, named by its content; gives its path on the device."""
        sha256 = hash_file(path)
        return self._copy(path, sha256, f"files/{sha256}{path.suffix}")

    def infer(
        self, artifact_format: Format, artifact: str, inputs: Sequence[str], into: Path, threads: int = 1
    ) -> tuple[list[Path], RuntimeReading]:
        """Run every sample on the device and bring one .npy file per output home, samples stacked on axis 0."""
        folder = f"{self._workdir}/outputs/{secrets.token_hex(8)}"
        request = {
            "command": "infer",
            "format": artifact_format,
            "artifact": artifact,
            "inputs": list(inputs),
            "output": f"{folder}/output",
            "threads": threads,
        }

        def step(transport: Transport) -> tuple[list[Path], RuntimeReading]:
            run_checked(transport, ["mkdir", "-p", "--", folder])
            try:
                events = self._ask(transport, request, INFER_TIMEOUT_S)
                count = pick(events, Done, self.device).outputs
                files = [into / f"output.{position}.npy" for position in range(count)]
                for file in files:
                    transport.fetch(f"{folder}/{file.name}", file)
            finally:
                with suppress(TargetError):
                    run_checked(transport, ["rm", "-rf", "--", folder])
            return files, pick(events, Opened, self.device).runtime

        return self._link.call(step, retry_timeouts=False)

    def measure(self, request: MeasureRequest) -> Trial:
        """Time a pushed artifact in a fresh process; what was not pushed as verified is refused."""
        if self._verified.get(request.artifact) != request.artifact_sha256:
            message = f"{request.artifact} was not pushed as verified in this session: nothing was measured"
            raise BuildError(message, hint="push(file, verified) gives the path to measure")
        retries_before = self._link.retries
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        events = self._link.call(lambda transport: self._measure(transport, request), retry_timeouts=False)
        opened, warmed = pick(events, Opened, self.device), pick(events, Warmed, self.device)
        before, after = ([one for one in events if isinstance(one, State) and one.when == when] for when in _MOMENTS)
        return Trial(
            round=request.round,
            variant=request.variant,
            format=request.format,
            artifact_sha256=request.artifact_sha256,
            device=self.device.name,
            started_utc=started,
            threads=request.threads,
            load_ns=pick(events, Loaded, self.device).load_ns,
            warmup_ns=warmed.ns,
            warmed_up=warmed.steady,
            samples_ns=pick(events, Samples, self.device).ns,
            peak_rss_bytes=warmed.peak_rss_bytes,
            runtime_rss_bytes=opened.rss_bytes,
            runtime=opened.runtime,
            before=pick(before, State, self.device).state,
            after=pick(after, State, self.device).state,
            agent_sha256=self.agent_sha256,
            retries=self._link.retries - retries_before,
        )

    def _measure(self, transport: Transport, request: MeasureRequest) -> list[Event]:
        self._lease.renew(transport)
        found = hash_remote(transport, request.artifact)
        if found != request.artifact_sha256:
            message = f"{request.artifact} on {self.device.name} has SHA-256 {found}, not {request.artifact_sha256}"
            raise CommandFailed(message, hint="something changed it after the push: push again")
        call = {
            "command": "measure",
            "format": request.format,
            "artifact": request.artifact,
            "inputs": list(request.inputs),
            "threads": request.threads,
            "min_samples": request.min_samples,
            "min_duration_ms": request.min_duration_ms,
            "max_warmup_ms": request.max_warmup_ms,
        }
        return self._ask(transport, call, request.timeout_s)

    def _ask(self, transport: Transport, request: Mapping[str, object], timeout_s: float) -> list[Event]:
        return list(call_agent(transport, self.device, self._agent, request, timeout_s=timeout_s))

    def _copy(self, path: Path, sha256: str, name: str) -> str:
        remote = f"{self._workdir}/{name}"
        self._link.call(lambda transport: copy_verified(transport, path, remote, sha256))
        return remote


_MOMENTS = ("before", "after")


def _greet(transport: Transport, device: Device) -> str:
    """Make the working folder; gives its absolute path. Lacks where there is no Python that can run the agent."""
    argv = [device.python, "-c", _GREETING, device.workdir]
    done = transport.run(argv, timeout_s=STEP_TIMEOUT_S)
    hint = f"install Python 3.9 or newer there, or correct `python` in the inventory's [{device.name}]"
    if done.code in {NOT_EXECUTABLE, NOT_FOUND}:
        raise Lacks(f"{device.name} cannot start {device.python}: {done.stderr.strip()}", hint=hint)
    if done.code != 0:
        raise explain_failure(argv, done.code, done.stderr)
    version, workdir = json.loads(done.stdout)
    if version < OLDEST_PYTHON:
        raise Lacks(f"{device.name} has Python {version[0]}.{version[1]} as {device.python}", hint=hint)
    return str(workdir)
