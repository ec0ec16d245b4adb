"""The host's side of the agent's protocol: sends one request, reads events, turns failures into errors."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeVar

from rankship_pipeline.foundation.errors import (
    AgentDied,
    AgentMismatch,
    CommandFailed,
    Lacks,
    NoSpace,
    ReadOnly,
    Rebooted,
    TargetBusy,
    TargetError,
)
from rankship_pipeline.foundation.formats import FACTS
from rankship_targets.devices.device import Device
from rankship_targets.devices.installing import show_kit, show_pip_install
from rankship_targets.transport.protocol import Transport
from rankship_targets.trials.events import Done, Event, Failure, FaultKind, Hello, State, read_event

# The agent's kind of fault → error class and hint.
_FAULTS: dict[FaultKind, tuple[type[TargetError], str]] = {
    "lacks_runtime": (Lacks, "install it on the device: {install}"),
    "bad_artifact": (
        CommandFailed,
        "build the artifact again; if it still fails, the device's runtime may be too old for it",
    ),
    "bad_input": (CommandFailed, "the inputs must be those that the artifact was exported with"),
    "bad_request": (CommandFailed, "the agent on the device and this host must be of the same release"),
    "failed": (CommandFailed, "the message is the runtime's own; `rankship doctor` shows its version"),
    "no_space": (NoSpace, "free space on the device or choose another workdir in the inventory"),
    "read_only": (ReadOnly, "choose a writable workdir; a card that turned read-only is wearing out"),
    "busy": (TargetBusy, "only one run measures on a device at a time: wait for that one to end"),
    "unknown_run": (AgentDied, "it was lost in a power cut, or somebody removed it: measure again"),
    "agent_died": (AgentDied, "{died}"),
    "rebooted": (Rebooted, "find out why it was restarted (power supply, watchdog), then run again"),
}
_DIED = "check whether the device ran out of memory (`dmesg` on it says so) or somebody killed the agent"
_KILLED = "was ended by signal 9:"  # how explain_failure writes the shell's 128 + 9
_SAME_RELEASE = "the agent and this host must be of the same release: reconnect, and the agent is copied again"

# How runtimes refuse a file that is newer than they are: onnxruntime, LiteRT, ExecuTorch.
_NEWER = re.compile(r"IR version|opset|op for builtin opcode|schema version|newer version", re.IGNORECASE)

T = TypeVar("T")


def call_agent(
    transport: Transport, device: Device, agent: str, request: Mapping[str, object], *, timeout_s: float
) -> Iterator[Event]:
    """Yield the events after the agent's greeting; a call that does not end with `done` raises its error."""
    text = json.dumps(request, sort_keys=True)
    event: Event | None = None
    try:
        with closing(transport.stream([device.python, agent, text], timeout_s=timeout_s)) as lines:
            first = next(lines, "")
            if not isinstance(read_event(first), Hello):
                message = f"the agent on {device.name} began with {first[:80]!r}, expected its greeting"
                raise AgentMismatch(message, hint=_SAME_RELEASE)
            for line in lines:
                event = read_event(line)
                if isinstance(event, Failure):
                    raise explain_fault(event, device, request)
                yield event
    except CommandFailed as failure:
        if _KILLED in str(failure):
            raise AgentDied(f"the agent on {device.name}: {failure}", hint=_DIED) from None
        raise
    if not isinstance(event, Done):
        raise AgentDied(f"the agent on {device.name} ended without a last event", hint=_DIED)


def explain_fault(fault: Failure, device: Device, request: Mapping[str, object]) -> TargetError:
    """Return the error for a failure that the agent reported."""
    kind, hint = _FAULTS[fault.kind]
    wanted = request.get("request", request)  # `spool` contains the detached run's own request
    named = str(wanted.get("format")) if isinstance(wanted, Mapping) else ""
    install = install_command(device, named)
    if fault.kind == "bad_artifact" and _NEWER.search(fault.message):
        hint = f"the device's runtime is older than the file: {show_kit(device.name)}; or on the device: {{install}}"
        install = install.replace(" pip install ", " pip install --upgrade ")
    return kind(f"{device.name}: {fault.message}", hint=hint.format(install=install, died=_DIED))


def install_command(device: Device, artifact_format: str) -> str:
    """Return the command that installs a format's runtime."""
    facts = next((one for known, one in FACTS.items() if known == artifact_format), None)
    return show_pip_install(device, facts.pip_packages if facts else artifact_format)


def pick(events: Sequence[Event], kind: type[T], device: Device) -> T:
    """Return the last event of a kind; AgentMismatch if there is none."""
    for event in reversed(events):
        if isinstance(event, kind):
            return event
    message = f"the agent on {device.name} never sent {kind.__name__.lower()!r}"
    raise AgentMismatch(message, hint=_SAME_RELEASE)


def split_turns(events: Sequence[Event], count: int, device: Device) -> list[list[Event]]:
    """Split a sweep's events by artifact; the events before the first artifact are part of each."""
    starts = [index for index, one in enumerate(events) if isinstance(one, State) and one.when == "before"]
    if len(starts) != count:
        message = f"the agent on {device.name} timed {len(starts)} artifacts, expected {count}"
        raise AgentMismatch(message, hint=_SAME_RELEASE)
    ends = [*starts[1:], len(events)]
    return [[*events[: starts[0]], *events[start:end]] for start, end in zip(starts, ends, strict=True)]
