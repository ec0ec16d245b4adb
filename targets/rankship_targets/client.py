"""The host's side of the agent's protocol: one request out, events in, failures turned into errors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeVar

from rankship_pipeline.errors import AgentMismatch, CommandFailed, Lacks, PersistentTargetError
from rankship_pipeline.records import Format
from rankship_targets.device import Device
from rankship_targets.events import Done, Event, Failure, Hello, read_event
from rankship_targets.transport import Transport

# What each format's runtime is installed with, into the device's own interpreter.
PACKAGES: dict[Format, str] = {
    "onnx": "onnxruntime numpy",
    "tflite": "ai-edge-litert numpy",
    "executorch": "executorch torch numpy (torch from PyTorch's CPU index)",
}
_HINTS = {
    "bad_artifact": "build the artifact anew; if it fails again, the device's runtime may be too old for it",
    "bad_input": "the inputs must be those that the artifact was exported with",
    "bad_request": "the agent on the device and this host must come from one release",
    "failed": "the message is the runtime's own; `rankship doctor` shows its version",
}

T = TypeVar("T")


def call_agent(
    transport: Transport, device: Device, agent: str, request: Mapping[str, object], *, timeout_s: float
) -> Iterator[Event]:
    """Give the events after the agent's greeting; ends normally only after `done`."""
    text = json.dumps(request, sort_keys=True)
    event: Event | None = None
    with closing(transport.stream([device.python, agent, text], timeout_s=timeout_s)) as lines:
        first = next(lines, "")
        if not isinstance(read_event(first), Hello):
            raise AgentMismatch(f"the agent on {device.name} began with {first[:80]!r}", hint="expected its greeting")
        for line in lines:
            event = read_event(line)
            if isinstance(event, Failure):
                raise explain_fault(event, device, request)
            yield event
    if not isinstance(event, Done):
        message = f"the agent on {device.name} ended without a last word"
        raise CommandFailed(message, hint="see whether the device ran out of memory: `dmesg` there says so")


def explain_fault(fault: Failure, device: Device, request: Mapping[str, object]) -> PersistentTargetError:
    """Make the error for what the agent could not do."""
    message = f"{device.name}: {fault.message}"
    if fault.kind == "lacks_runtime":
        return Lacks(message, hint=f"install it on the device: {install_command(device, str(request.get('format')))}")
    return CommandFailed(message, hint=_HINTS[fault.kind])


def install_command(device: Device, artifact_format: str) -> str:
    """Write the command that installs a format's runtime."""
    packages = next((names for known, names in PACKAGES.items() if known == artifact_format), artifact_format)
    return f"{device.python} -m pip install {packages}"


def pick(events: Sequence[Event], kind: type[T], device: Device) -> T:
    """Find the last event of a kind that must be there."""
    for event in reversed(events):
        if isinstance(event, kind):
            return event
    message = f"the agent on {device.name} never said {kind.__name__.lower()!r}"
    raise AgentMismatch(message, hint="the agent and this host must come from one release: reconnect")
