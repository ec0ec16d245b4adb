"""What every meter can do, the choice of one, and the table of all."""

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
# meter → module:function that makes it. The first six are read on the device by the agent, the others from a file on
# this host: a phone's trace, a bench meter's table, a trace recorded earlier.
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

    What the device or the way to it does wrong is a TargetError, a file that is no recording an InputError. A meter
    that has a problem raises Lacks on `start`.
    """

    def probe(self) -> Offer:
        """Tell whether the meter is there and readable, and what it offers."""
        ...

    def start(self) -> None:
        """Begin to record; on return, readings are taken."""
        ...

    def stop(self) -> PowerTrace:
        """End the recording; it covers the time from the end of `start` to the call of `stop`."""
        ...


@dataclass(frozen=True)
class Reach:
    """The way to the agent that reads a meter: it runs over a connection of its own, beside what is measured.

    A recording that nobody ends goes on for `limit_ms`.
    """

    device: Device
    agent: str
    connect: Callable[[Device], Transport] = open_transport
    limit_ms: int = 600_000


def open_meter(choice: MeterChoice, reach: Reach | None = None) -> Meter:
    """Make the meter that was chosen; one on the device needs `reach`, one that left a file needs `choice.file`."""
    module, function = METERS[choice.name].split(":")
    opener: Callable[[MeterChoice, Reach | None], Meter] = getattr(importlib.import_module(module), function)
    return opener(choice, reach)


def require_file(choice: MeterChoice) -> Path:
    """Find the file that a meter left; InputError where none is named."""
    if choice.file is None:
        raise InputError(f"meter {choice.name} needs the file it left", hint="name it as `file`")
    return Path(choice.file)
