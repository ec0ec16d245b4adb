"""Opens the transport that a device's inventory entry names; an emulated device is started first."""

import importlib
from collections.abc import Callable

from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import Transport

# transport → module:function that opens it; imported on use, so that a local run never loads an SSH library.
TRANSPORTS = {
    "local": "rankship_targets.transport.local:open_local",
    "ssh": "rankship_targets.transport.ssh.connection:open_ssh",
    "adb": "rankship_targets.transport.adb.connection:open_adb",
}


def open_transport(device: Device) -> Transport:
    """Connect to a device by the transport of its inventory entry; an emulated one is started if necessary."""
    if device.twin is not None:
        from rankship_targets.twin import ensure_running

        device = ensure_running(device)
    module, function = TRANSPORTS[device.transport].split(":")
    opener: Callable[[Device], Transport] = getattr(importlib.import_module(module), function)
    return opener(device)
