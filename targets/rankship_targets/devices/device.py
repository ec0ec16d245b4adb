"""Devices and the inventory that names them; nothing here connects to a device."""

import difflib
import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rankship_pipeline.foundation.codec import decode, decode_text, parse_toml
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.meter_choice import MeterChoice, check_choice

THIS_MACHINE = "this-machine"
_SSH_PORT = 22
# Names become part of file names and of comma-separated arguments: words of any script, with . _ - and spaces inside.
_NAME = re.compile(r"\w(?:[\w .-]{0,62}\w)?")
# Each emulated stand-in and the one transport that reaches it.
TWIN_TRANSPORTS: dict[str, Literal["ssh", "adb"]] = {"pi4": "ssh", "pixel6": "adb"}


@record
class Device:
    """One board, phone or machine and how to reach it; the table's heading is its name.

    Keys:
        name: its name in the inventory
        transport: how to reach it
        host: address, over ssh
        port: port, over ssh
        user: login user, over ssh
        host_key: the pinned public key, "ssh-ed25519 AAAA…"
        key_file: the private key on this host; by default the SSH agent and the usual files are tried
        jump: another ssh device of the inventory to go through
        via: the device that `jump` names, looked up when the inventory is read
        serial: over adb, as `adb devices` prints it ("1A2B3C4D5E", "192.168.1.7:5555")
        fingerprint: over adb, the pinned build (ro.build.fingerprint)
        python: the interpreter on the device
        workdir: a path on the device; a relative one starts at the home directory, on a phone at /data/local/tmp
        cpus: the CPU cores that a session runs on while it measures
        governor: the frequency governor while it measures, restored afterwards
        cool_below_mc: before measuring, wait until the device is below this, in thousandths of a degree Celsius
        twin: an emulated stand-in, started when it is used
        meter: what measures its power, read when a suite measures energy
        label: free text for tables
        benchmark_model: the path on the device of LiteRT's own program, for its GPU and NNAPI delegates
    """

    name: str
    transport: Literal["local", "ssh", "adb"]
    host: str | None = None
    port: int = _SSH_PORT
    user: str | None = None
    host_key: str | None = None
    key_file: str | None = None
    jump: str | None = None
    via: "Device | None" = None
    serial: str | None = None
    fingerprint: str | None = None
    python: str = "python3"
    workdir: str = ".cache/rankship/device"
    cpus: tuple[int, ...] | None = None
    governor: str | None = None
    cool_below_mc: int | None = None
    twin: Literal["pi4", "pixel6"] | None = None
    meter: MeterChoice | None = None
    label: str = ""
    benchmark_model: str | None = None


def find_device(name: str, inventory: Path | None = None) -> Device:
    """Return the device of this name; the InputError for an unknown one names the nearest and all known devices."""
    devices = load_inventory(inventory)
    if name in devices:
        return devices[name]
    nearest = difflib.get_close_matches(name, devices, n=1)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    known = ", ".join(sorted(devices))
    hint = f"{guess}known devices: {known}; add others to {inventory or inventory_path()}"
    raise InputError(f"unknown device {name!r}", hint=hint)


def load_inventory(path: Path | None = None) -> dict[str, Device]:
    """Read all devices by name, this machine first; a missing file is an error only if somebody named it."""
    devices = {THIS_MACHINE: describe_this_machine()}
    source = path or inventory_path()
    if path is None and "RANKSHIP_DEVICES" not in os.environ and not source.exists():
        return devices
    for name, table in parse_toml(read_inventory(source), str(source)).items():
        if name in devices:
            raise InputError(f"{source}: {name!r} is built in", hint="give your device another name")
        devices[name] = _decode_device(name, table, source)
    return {name: _find_way(device, devices, source) for name, device in devices.items()}


def inventory_path() -> Path:
    """Path of the inventory without --inventory: $RANKSHIP_DEVICES, or devices.toml in the user's configuration."""
    named = os.environ.get("RANKSHIP_DEVICES")
    return Path(named) if named else user_folder("XDG_CONFIG_HOME", ".config") / "rankship" / "devices.toml"


def describe_this_machine() -> Device:
    """Return the built-in local device; the agent runs in this process's Python interpreter."""
    workdir = user_folder("XDG_CACHE_HOME", ".cache") / "rankship" / "device"
    return Device(
        name=THIS_MACHINE, transport="local", python=sys.executable, workdir=str(workdir), label="the host itself"
    )


def user_folder(variable: str, fallback: str) -> Path:
    """Return an XDG folder; as its specification says, a relative value counts as unset."""
    named = Path(os.environ.get(variable, ""))
    return named if named.is_absolute() else Path.home() / fallback


def read_inventory(path: Path) -> str:
    """Return an inventory's text; InputError if everyone may write the file, or replace it in its folder."""
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as failure:
        hint = "name an existing file with --inventory or RANKSHIP_DEVICES"
        raise InputError(f"cannot read the inventory {path}: {failure.strerror}", hint=hint) from None
    if mode & stat.S_IWOTH:
        message = f"the inventory {path} is writable by everyone, so its pinned host keys prove nothing"
        raise InputError(message, hint=f"run {show_command('chmod', 'o-w', path)}")
    refuse_open_folder(path.resolve().parent)
    return decode_text(data, str(path))


def refuse_open_folder(folder: Path) -> None:
    """Refuse a folder in which everyone may replace files; in a sticky one (/tmp) only their owners may."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        message = f"the inventory's folder {folder} is writable by everyone, so its pinned host keys prove nothing"
        raise InputError(message, hint=f"run {show_command('chmod', 'o-w', folder)}")


def check_name(name: str, where: str) -> None:
    """Refuse a name that cannot be part of a file name or of `--on A,B`."""
    if not _NAME.fullmatch(name):
        message = f"{where}: {name!r} cannot be a device's name"
        raise InputError(message, hint="use at most 64 letters and digits, with '.', '_', '-' and spaces between them")


def _decode_device(name: str, table: object, source: Path) -> Device:
    where = f"{source}: [{name}]"
    if not isinstance(table, dict):
        message = f"{source}: {name} = {table!r} stands above every heading"
        raise InputError(message, hint="write the device's name as a heading above its keys: [pi4]")
    check_name(name, where)
    for key, hint in (("name", "the table's heading is the name"), ("via", 'write jump = "…", the other\'s name')):
        if key in table:
            raise InputError(f"{where}: unknown key {key!r}", hint=hint)
    text = json.dumps({**table, "name": name}, default=str)
    device = decode(Device, text, where=where)
    _check(device, where)
    return _resolve_meter(device, source, where)


def _resolve_meter(device: Device, source: Path, where: str) -> Device:
    """Check the meter; its `file`, if relative, is resolved against the inventory's folder."""
    if device.meter is None:
        return device
    check_choice(device.meter, f"{where}: meter")
    if device.meter.file is None:
        return device
    file = source.resolve().parent / Path(device.meter.file).expanduser()
    return replace(device, meter=replace(device.meter, file=str(file)))


def _find_way(device: Device, devices: Mapping[str, Device], source: Path, behind: tuple[str, ...] = ()) -> Device:
    """Put the jump host, with its own jump host, into `via`; `behind` are the devices that lead here."""
    if device.jump is None:
        return device
    where = f"{source}: [{device.name}]"
    jump = devices.get(device.jump)
    if jump is None or jump.transport != "ssh" or jump.twin is not None:
        known = ", ".join(name for name, one in devices.items() if one.transport == "ssh" and name != device.name)
        message = f"{where}: jump {device.jump!r} is not an ssh device of the inventory"
        raise InputError(message, hint=f"ssh devices there: {known or 'none'}")
    if device.jump in (*behind, device.name):
        raise InputError(f"{where}: jump {device.jump!r} leads back to itself", hint="remove `jump` from one of them")
    return replace(device, via=_find_way(jump, devices, source, (*behind, device.name)))


def _check(device: Device, where: str) -> None:
    if not device.workdir or device.workdir.startswith(("~", "-")):
        message = f"{where}: workdir {device.workdir!r} must be absolute or relative to the home directory"
        raise InputError(message, hint='leave "~/" out: a relative path starts there')
    if device.jump is not None and device.transport != "ssh":
        raise InputError(f"{where}: only an ssh device can have `jump`", hint="remove jump")
    if device.twin is not None:
        if device.transport != TWIN_TRANSPORTS[device.twin]:
            hint = f'write transport = "{TWIN_TRANSPORTS[device.twin]}"'
            raise InputError(f"{where}: twin {device.twin!r} is not reached over {device.transport}", hint=hint)
        return
    if device.transport == "adb" and not device.serial:
        raise InputError(f"{where}: an adb device needs its serial", hint="copy it from `adb devices`")
    if device.transport == "ssh":
        _check_ssh(device, where)


def _check_ssh(device: Device, where: str) -> None:
    for key in ("host", "user"):
        if not getattr(device, key):
            raise InputError(f"{where}: an ssh device needs {key!r}", hint=f'add {key} = "…"')
    if not device.host_key:
        usual = device.port == _SSH_PORT
        address = f"{device.user}@{device.host}" + ("" if usual else f":{device.port}")
        scan = show_command("ssh-keyscan", *([] if usual else ["-p", device.port]), "-t", "ed25519", device.host)
        hint = (
            f"remove it and run {show_command('rankship', 'devices', 'add', device.name, address)}; or run "
            f"{scan}, compare its fingerprint with the one the board itself shows "
            "(`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` at its console), and add "
            'host_key = "ssh-ed25519 AAAA…"'
        )
        raise InputError(f"{where}: an ssh device needs its host key pinned", hint=hint)
    if len(device.host_key.split()) not in {2, 3}:
        message = f"{where}: host_key is not of the form 'ssh-ed25519 AAAA…'"
        raise InputError(message, hint="copy the type and the key from the board's ssh_host_ed25519_key.pub")
