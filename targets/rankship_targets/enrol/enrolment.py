"""Adds a device to the inventory: its identity is shown, confirmed and pinned before anything else happens."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import CommandFailed, HostKeyChanged, InputError
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import TWIN_TRANSPORTS, Device, find_device, load_inventory
from rankship_targets.devices.inventory import Value, add_device
from rankship_targets.session.session import open_session
from rankship_targets.transport.protocol import Transport, run_checked

_ADDRESS = re.compile(
    r"(?P<user>[^@\s-][^@\s]*)@(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:@\s\[\]-][^:@\s\[\]]*))(?::(?P<port>[0-9]{1,5}))?"
)
_ALIAS = re.compile(r"[^@\s:\[\]-][^@\s:\[\]]*")
_LAST_PORT = 65_535
_BUILD = "ro.build.fingerprint"
_WORKDIR_ANDROID = "/data/local/tmp/rankship"


def resolve_address(name: str, text: str, jump: str | None, inventory: Path) -> tuple[Device, list[str]]:
    """Return the device at USER@HOST[:PORT] or behind an alias of ~/.ssh/config, and what to tell of the latter.

    What the text says comes before the configuration; `jump` names a device of the inventory, before ProxyJump.
    """
    from rankship_targets.transport.ssh.alias import read_alias

    bare = _ALIAS.fullmatch(text)
    alias = read_alias(text) if bare else None
    if bare and alias:
        device = Device(name=name, transport="ssh", user=alias.user, host=text)
    else:
        device = parse_address(name, text)
        alias = read_alias(device.host or "")
    if alias is None:
        return find_jump(device, jump, inventory), []
    if alias.command and not jump:
        message = f"{text} is reached by ProxyCommand {alias.command!r}, which Rankship does not run"
        hint = "use ProxyJump in ~/.ssh/config, or add the host in between as a device and name it with --jump"
        raise InputError(message, hint=hint)
    jump = jump or (_find_jump_of(alias.jump, text, inventory) if alias.jump else None)
    port = device.port if ":" in text.rpartition("]")[2].rpartition("@")[2] else alias.port
    found = replace(device, host=alias.host, port=port)
    changed = (found.host, found.port) != (device.host, device.port)
    notes = [f"{text} is {found.user}@{found.host}:{found.port}, says ~/.ssh/config"] if changed else []
    keys = [file for file in alias.key_files if Path(file).is_file()]
    if keys:
        found = replace(found, key_file=keys[0])
    notes += [f"IdentityFile {file} is not used" for file in alias.key_files if file not in keys[:1]]
    notes += [f"{setting} of ~/.ssh/config is not followed" for setting in alias.not_followed]
    return find_jump(found, jump, inventory), notes


def _find_jump_of(text: str, host: str, inventory: Path) -> str:
    """Return the inventory's name for ProxyJump's last host; InputError if it is not there."""
    from rankship_targets.transport.ssh.alias import read_alias

    last = text.rsplit(",", maxsplit=1)[-1].removeprefix("ssh://")
    user, _, address = last.rpartition("@")
    alias = read_alias(address.partition(":")[0])
    known = load_inventory(inventory).values() if inventory.exists() else ()
    for device in known:
        if device.transport == "ssh" and device.host in {address.partition(":")[0], alias.host if alias else ""}:
            return device.name
    way = last if user or (alias and ":" not in last) else f"USER@{last}"
    message = f"{host} is reached through {text} (ProxyJump of ~/.ssh/config), which is not in the inventory"
    add = show_command("rankship", "devices", "add", "NAME", way)
    raise InputError(message, hint=f"add it first, so that its host key is pinned too: {add}; then this again")


def parse_address(name: str, text: str) -> Device:
    """Parse user@host, user@host:port or user@[IPv6]:port into an ssh device, which has no host key yet."""
    found = _ADDRESS.fullmatch(text)
    port = int(found["port"] or 22) if found else 0
    if found is None or not 0 < port <= _LAST_PORT:
        hint = "write USER@HOST or USER@HOST:PORT, such as pi@raspberrypi.local, or an alias of ~/.ssh/config"
        raise InputError(f"{text!r} is not an address", hint=hint)
    return Device(name=name, transport="ssh", user=found["user"], host=found["v6"] or found["host"], port=port)


def pin_host_key(device: Device, fingerprint: str | None, ask: Callable[[str], str]) -> Device:
    """Fetch the host key and have it confirmed; returns the device with the key pinned.

    `fingerprint` is what the user read at the board's own console (SHA256:…) and must be equal; without it, `ask` is
    called with a question that shows the fingerprint, and must return "yes".
    """
    from rankship_targets.enrol.host_key import fetch_host_key

    found = fetch_host_key(device)
    kind = found.get_name()
    if fingerprint is not None:
        if fingerprint != found.fingerprint:
            message = f"{device.host}:{device.port} shows {kind} {found.fingerprint}, --fingerprint says {fingerprint}"
            hint = "read it again at the board's own console: something else may answer at this address"
            raise HostKeyChanged(message, hint=hint)
    elif ask(describe_key(device, kind, found.fingerprint)) != "yes":
        raise InputError("the fingerprint was not confirmed: nothing was written", hint='type the whole word "yes"')
    return replace(device, host_key=f"{kind} {found.get_base64()}")


def describe_key(device: Device, kind: str, fingerprint: str) -> str:
    """Return the question: what the user must compare before typing yes."""
    short = {"ssh-ed25519": "ed25519", "ssh-rsa": "rsa"}.get(kind, kind.partition("-")[0])
    return (
        f"{device.host}:{device.port} shows this host key:\n\n    {kind} {fingerprint}\n\n"
        "Compare it with what the board shows at its own console (keyboard and screen, or serial line):\n\n"
        f"    ssh-keygen -lf /etc/ssh/ssh_host_{short}_key.pub\n\n"
        "Are the two the same? Type yes to pin it: "
    )


def enrol_board(device: Device, inventory: Path) -> str:
    """Log in with the pinned key, probe the board and write its entry; returns the board's model."""
    with open_session(device) as session:
        probe = session.probe()
    label = probe.cpu_model or probe.machine
    table: dict[str, Value] = {"transport": "ssh", "host": device.host or ""}
    if device.port != Device(name="", transport="ssh").port:
        table["port"] = device.port
    table |= {"user": device.user or "", "host_key": device.host_key or ""}
    chosen = {"key_file": device.key_file, "jump": device.jump}
    table |= {key: value for key, value in chosen.items() if value is not None}
    if device.python != Device(name="", transport="ssh").python:
        table["python"] = device.python
    add_device(inventory, device.name, {**table, "label": label})
    return label


def enrol_phone(
    name: str, serial: str, inventory: Path, connect: Callable[[Device], Transport] = open_transport
) -> str:
    """Pin a phone by its serial and its build, and write its entry; returns its model."""
    with connect(Device(name=name, transport="adb", serial=serial, workdir=_WORKDIR_ANDROID)) as transport:
        build = _read_property(transport, _BUILD)
        model = _read_property(transport, "ro.product.model")
    if not build:
        message = f"{serial} has no {_BUILD}: it is not an Android device, or its shell is restricted"
        raise CommandFailed(
            message, hint=f"{show_command('adb', '-s', serial, 'shell', 'getprop', _BUILD)} must print one line"
        )
    table: dict[str, Value] = {"transport": "adb", "serial": serial, "fingerprint": build}
    add_device(inventory, name, {**table, "workdir": _WORKDIR_ANDROID, "label": model})
    return model


def enrol_twin(name: str, twin: str, inventory: Path) -> str:
    """Write the entry of an emulated stand-in, which is started when it is used; returns its label."""
    label = f"emulated stand-in for a {twin}: its numbers mean nothing"
    add_device(inventory, name, {"transport": TWIN_TRANSPORTS[twin], "twin": twin, "label": label})
    return label


def find_jump(device: Device, jump: str | None, inventory: Path) -> Device:
    """Return the device with its jump host, if `jump` names one."""
    if jump is None:
        return device
    via = find_device(jump, inventory)
    if via.transport != "ssh" or via.twin is not None:
        raise InputError(f"--jump {jump}: not an ssh device", hint="add the jump host as a device first")
    return replace(device, jump=jump, via=via)


def _read_property(transport: Transport, name: str) -> str:
    return run_checked(transport, ["getprop", name]).strip()
