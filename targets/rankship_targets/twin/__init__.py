"""Emulated stand-ins for devices: real aarch64 code behind the real transports.

They show that the code runs and that the transport works; their times, temperatures and energies mean nothing.
"""

import importlib
from collections.abc import Callable

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.devices.device import Device

# twin → module:function that starts it (or finds it running in this process) and returns the device that reaches it.
TWINS: dict[str, str] = {
    "pi4": "rankship_targets.twin.pi:start_pi",
    "pixel6": "rankship_targets.twin.pixel:start_pixel",
}


def ensure_running(device: Device) -> Device:
    """Start the device's twin unless this process runs it already; it ends with this process."""
    if device.twin not in TWINS:
        raise InputError(f"{device.name}: there is no twin {device.twin!r}", hint=f"known: {', '.join(TWINS)}")
    module, function = TWINS[device.twin].split(":")
    start: Callable[[Device], Device] = getattr(importlib.import_module(module), function)
    return start(device)
