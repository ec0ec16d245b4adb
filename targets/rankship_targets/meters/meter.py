"""What every meter can do (`Meter`), the table of all meters, and how one is opened."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice, MeterName
from rankship_targets.transport.protocol import Transport
from rankship_targets.trials.trace import Offer, PowerTrace

_ON_DEVICE = "rankship_targets.meters.device_meter:open_device_meter"
_FROM_FILE = "rankship_targets.meters.file_meter:open_file_meter"
# meter → module:function that makes it. The agent reads the first six on the device; the others are read from a file
# on this host: a phone's trace, a bench meter's table, a trace recorded earlier.
METERS: dict[MeterName, str] = {
    "hwmon": _ON_DEVICE,
    "rails": _ON_DEVICE,
    "powerstats": _ON_DEVICE,
    "battery": _ON_DEVICE,
    "rapl": _ON_DEVICE,
    "model": _ON_DEVICE,
    "perfetto": _FROM_FILE,
    "bench": _FROM_FILE,
    "replay": _FROM_FILE,
}


class Meter(Protocol):
    """A source of one power trace at a time.

    A fault of the device or the connection is a TargetError, a file that is not a recording an InputError. A meter that
    has a problem raises Lacks on `start`.
    """

    def probe(self) -> Offer:
        """Return what the meter offers; `problem` is set if it is not there or not readable."""
        ...

    def start(self) -> None:
        """Begin to record; when this returns, readings are being taken."""
        ...

    def stop(self) -> PowerTrace:
        """End the recording; it covers the time from the end of `start` to the call of `stop`."""
        ...


@dataclass(frozen=True)
class Reach:
    """How to reach the agent that reads a meter: over its own connection, while something is measured.

    A recording that is not stopped ends after `limit_ms`.
    """

    device: Device
    agent: str
    connect: Callable[[Device], Transport] = open_transport
    limit_ms: int = 600_000


def open_meter(choice: MeterChoice, reach: Reach | None = None) -> Meter:
    """Return the chosen meter; a meter on the device needs `reach`, a meter that writes a file `choice.file`."""
    module, function = METERS[choice.name].split(":")
    opener: Callable[[MeterChoice, Reach | None], Meter] = getattr(importlib.import_module(module), function)
    return opener(choice, reach)


def require_file(choice: MeterChoice) -> Path:
    """Return the path of a meter's recording; InputError if none is named."""
    if choice.file is None:
        raise InputError(f"meter {choice.name} needs the file that it wrote", hint="name it as `file`")
    return Path(choice.file)
