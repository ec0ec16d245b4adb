"""Waits until the phone with a serial answers, or raises the error that says why it does not."""

import time

from rankship_pipeline.foundation.errors import (
    AmbiguousDevice,
    ConnectionLost,
    HostKeyChanged,
    TargetError,
    TargetTimeout,
    Unauthorised,
    Unreachable,
)
from rankship_targets.devices.device import Device
from rankship_targets.transport.adb.client import AdbClient, list_attached, show_end
from rankship_targets.transport.protocol import Transport, run_checked

READY = "device"
# How long to wait for each state to change: `adb connect` reports failure while the phone is still deciding.
PATIENCE_S = {"offline": 6.0, "connecting": 6.0, "unauthorized": 3.0, "authorizing": 6.0}
ANSWER_S = 10.0  # less than the silence after which a running command checks by itself
_ABSENT_PATIENCE_S = 2.0
_POLL_S = 0.1
_RECONNECT = {"offline", "connecting"}


def await_ready(client: AdbClient, device: Device) -> None:
    """Wait until the device can be used; over TCP, connect first."""
    over_tcp = is_address(device.serial or "")
    said = _connect(client, device) if over_tcp else ""
    start = time.monotonic()
    # Only a connection that was there before may need a second one: it may be dead before the server knows it.
    reconnected = bool(said) and "already connected" not in said
    while True:
        state = find_state(client, device)
        if state == READY:
            return
        waited = time.monotonic() - start
        if over_tcp and state in _RECONNECT and not reconnected and waited > PATIENCE_S[state] / 2:
            # The server keeps a dead connection as "offline" and does not connect again by itself.
            client.call("disconnect", device.serial or "")
            said, reconnected = _connect(client, device), True
        patience_s = (_ABSENT_PATIENCE_S if over_tcp else 0.0) if state is None else PATIENCE_S.get(state, 0.0)
        if waited >= patience_s:
            raise explain_state(device, state, said)
        time.sleep(_POLL_S)


def find_state(client: AdbClient, device: Device) -> str | None:
    """Return the state in which adb sees the device; None if it sees none, AmbiguousDevice if several."""
    states = [one.state for one in list_attached(client) if one.serial == device.serial]
    if len(states) > 1:
        message = f"{device.name}: {len(states)} attached devices have the serial {device.serial}"
        raise AmbiguousDevice(message, hint="unplug all but one: adb cannot tell them apart")
    return states[0] if states else None


def explain_state(device: Device, state: str | None, said: str) -> TargetError:
    """Return the error for a device that cannot be used."""
    where = f"{device.name} (adb, {device.serial})"
    if state is None:
        why = f": {said}" if said else ": no such device is attached"
        hint = "check that it is on, its cable in (or its address right) and USB debugging allowed; see `adb devices`"
        return Unreachable(f"{where}{why}", hint=hint)
    if state in {"unauthorized", "authorizing"}:
        hint = "unlock the phone and accept the prompt 'Allow USB debugging?' on its screen, then try again"
        return Unauthorised(f"{where} has not accepted this computer's key", hint=hint)
    if state.startswith("no permissions"):
        hint = "install Android's udev rules (`apt-get install android-sdk-platform-tools-common`) and replug it"
        return Unreachable(f"{where}: this user may not open it: {state}", hint=hint)
    if state in _RECONNECT:
        hint = "replug it or restart its debugging; it may be booting"
        return ConnectionLost(f"{where} is {state}: it does not answer adb", hint=hint)
    return ConnectionLost(f"{where} is in the state {state!r}, expected {READY!r}", hint="boot it into Android")


def check_build(transport: Transport, device: Device) -> None:
    """Check that the device answers, and that its build is the one pinned in the inventory, if one is pinned."""
    try:
        found = run_checked(transport, ["getprop", "ro.build.fingerprint"], timeout_s=ANSWER_S).strip()
    except TargetTimeout:
        message = f"{device.name} (adb, {device.serial}) is attached and did not answer for {ANSWER_S:g} s"
        raise Unreachable(message, hint="it hangs: replug it, or restart it") from None
    if device.fingerprint is not None and found != device.fingerprint:
        message = f"{device.name} runs the build {found!r}, the inventory pins {device.fingerprint!r}"
        hint = "it is another phone, or it was updated: if that is right, correct its fingerprint in the inventory"
        raise HostKeyChanged(message, hint=hint)


def is_address(serial: str) -> bool:
    """Return whether a serial is "host:port", not a USB serial."""
    host, _, port = serial.rpartition(":")
    return bool(host) and port.isdigit()


def _connect(client: AdbClient, device: Device) -> str:
    """Connect over TCP unless connected; returns adb's message, which may be wrong after success and failure."""
    try:
        if find_state(client, device) == READY:
            return ""
        return show_end(client.call("connect", device.serial or ""))
    except TargetTimeout:
        return "`adb connect` did not end"
