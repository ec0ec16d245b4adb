"""Runners for the parity gate: the agent in a fresh process, on this machine or on a device."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rankship_pipeline.foundation.artifact_key import Delegate
from rankship_pipeline.foundation.errors import CommandFailed
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import RunOutput
from rankship_targets.client.agent_file import find_agent
from rankship_targets.client.calls import call_agent, pick
from rankship_targets.devices.device import Device, describe_this_machine
from rankship_targets.session.agent_requests import ask_to_infer, ask_to_measure
from rankship_targets.session.session import INFER_TIMEOUT_S, Session
from rankship_targets.transport.local import LocalTransport
from rankship_targets.trials.events import Done, Opened, Samples
from rankship_targets.trials.request import InferWay, MeasureRequest
from rankship_targets.trials.trial import RuntimeReading


class HostRunner:
    """Runs artifacts on this machine."""

    def __init__(self, threads: int = 1, device: Device | None = None) -> None:
        self._threads = threads
        self._device = device or describe_this_machine()

    def run(
        self,
        format: Format,  # noqa: A002 - as the protocol names it
        artifact: Path,
        inputs: Sequence[Path],
        into: Path,
        rows: int = 1,
        generation: Generation | None = None,
    ) -> RunOutput:
        """Run every sample, `rows` at once; `into` gets one .npy file per output."""
        output = str(into.resolve() / "output")
        paths = [str(path.resolve()) for path in inputs]
        way = InferWay(threads=self._threads, rows=rows, generation=generation)
        request = ask_to_infer(format, str(artifact.resolve()), paths, output, way)
        with LocalTransport() as transport:
            events = list(call_agent(transport, self._device, str(find_agent()), request, timeout_s=INFER_TIMEOUT_S))
        count = pick(events, Done, self._device).outputs
        files = [into / f"output.{position}.npy" for position in range(count)]
        return _describe(files, pick(events, Opened, self._device).runtime)

    def time(self, request: MeasureRequest) -> tuple[int, ...]:
        """Time an artifact in a fresh process, in ns, proven or not: files of other toolchains have no proof."""
        asked = ask_to_measure(request, self._device)
        with LocalTransport() as transport:
            events = list(call_agent(transport, self._device, str(find_agent()), asked, timeout_s=request.timeout_s))
        return pick(events, Samples, self._device).ns


class DeviceRunner:
    """Runs artifacts, verified or not, on a device that a session holds.

    `pushed` is SHA-256 → path on the device of files that the session has already copied: these are not copied again.
    `delegate` is what the runtime is asked for, None for what it does by itself.
    """

    def __init__(
        self,
        session: Session,
        threads: int = 1,
        pushed: Mapping[str, str] | None = None,
        delegate: Delegate | None = None,
    ) -> None:
        self._session = session
        self._threads = threads
        self._pushed = pushed or {}
        self._delegate = delegate

    def run(
        self,
        format: Format,  # noqa: A002 - as above
        artifact: Path,
        inputs: Sequence[Path],
        into: Path,
        rows: int = 1,
        generation: Generation | None = None,
    ) -> RunOutput:
        """Copy the files, run every sample on the device, and fetch the outputs into `into`."""
        remote = self._pushed.get(hash_file(artifact)) or self._session.push_file(artifact)
        remotes = [self._session.push_file(path) for path in inputs]
        way = InferWay(threads=self._threads, rows=rows, generation=generation, delegate=self._delegate)
        files, reading = self._session.infer(format, remote, remotes, into, way)
        return _describe(files, reading)


def _describe(files: Sequence[Path], reading: RuntimeReading) -> RunOutput:
    if not files:
        raise CommandFailed("the artifact has no outputs", hint="export a model that returns at least one tensor")
    return RunOutput(outputs=tuple(map(str, files)), runtime=reading.name, runtime_version=reading.version)
