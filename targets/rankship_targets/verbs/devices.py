"""The commands `rankship devices` and `rankship doctor`; what they need is imported when they run."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.commands import quote_words
from rankship_pipeline.foundation.errors import InputError, Lacks, TargetError
from rankship_pipeline.foundation.flags import parse, share, start_parser
from rankship_targets.devices.device import TWIN_TRANSPORTS, find_device, inventory_path, load_inventory

if TYPE_CHECKING:
    from rankship_targets.devices.device import Device
    from rankship_targets.enrol.doctor import Check
    from rankship_targets.session.session import Session

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def devices(argv: list[str]) -> int:
    """`rankship devices [add|remove]`: list the inventory, or change it."""
    parser = start_parser("devices", "List the devices, add one, remove one.", "--inventory")
    again = [share("--inventory", again=True)]  # accepted before and after add or remove
    verbs = parser.add_subparsers(dest="change", metavar="add|remove")
    add = verbs.add_parser("add", help="pin a device's identity and write its entry", parents=again)
    add.add_argument("name", help="the device's name in the inventory")
    add.add_argument(
        "address", nargs="?", help="USER@HOST[:PORT] of a board reached over SSH, or an alias of ~/.ssh/config"
    )
    add.add_argument("--adb", metavar="SERIAL", help="a phone instead, as `adb devices` prints it")
    add.add_argument("--twin", choices=sorted(TWIN_TRANSPORTS), help="an emulated stand-in instead, to try things out")
    add.add_argument("--key", type=Path, metavar="FILE", help="private key (default: the SSH agent, the usual files)")
    add.add_argument("--jump", metavar="NAME", help="the device of the inventory that is the jump host")
    add.add_argument("--python", metavar="PATH", help="the interpreter on the device (default: python3)")
    confirm = "the key's fingerprint at the board's own console (default: ask to compare it)"
    add.add_argument("--fingerprint", metavar="SHA256:…", help=confirm)
    remove = verbs.add_parser("remove", help="remove a device's entry", parents=again)
    remove.add_argument("name")
    arguments = parse(parser, argv)
    if arguments.change == "add":
        _add(arguments)
    elif arguments.change == "remove":
        from rankship_targets.devices.inventory import remove_device

        remove_device(arguments.inventory or inventory_path(), arguments.name)
        sys.stderr.write(f"removed {arguments.name}\n")
    else:
        _list(load_inventory(arguments.inventory))
    return 0


def doctor(argv: list[str]) -> int:
    """Probe a device and print every check, then what to do; exit status 4 if one failed."""
    parser = start_parser("doctor", "Check a device for everything that could spoil its numbers.", "--inventory")
    parser.add_argument("device", help="a name from `rankship devices`")
    arguments = parse(parser, argv)
    device = find_device(arguments.device, arguments.inventory)

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    checks = _examine(device)
    table = Table("check", "", "finding", title=escape(f"{device.name} {device.label}".strip()))
    for check in checks:
        table.add_row(check.name, _show_verdict(check), escape(check.finding))
    console = Console(highlight=False)
    console.print(table)
    for check in checks:
        if check.advice:  # below the table, each on one line: a command that is folded cannot be copied
            console.print(f"{_show_verdict(check)} {check.name}: {escape(check.advice)}", soft_wrap=True)
    return TargetError.exit_code if any(check.verdict == "fail" for check in checks) else 0


def _show_verdict(check: "Check") -> str:
    return f"[{_COLOURS[check.verdict]}]{check.verdict}[/]"


def _examine(device: "Device") -> "list[Check]":
    """Return all checks, those of the connection first; a device that answers leaves its quarantine."""
    from rankship_targets.devices import quarantine
    from rankship_targets.enrol.doctor import Check, examine, examine_clock, examine_delegates
    from rankship_targets.session.session import open_session

    troubles = quarantine.read_troubles(device)
    checks = _examine_attachment(device)
    try:
        with open_session(device) as session:
            asked_ns = time.time_ns()
            probe = session.probe()
            answered_ns = time.time_ns()
            found = [*examine_delegates(probe, session.list_delegates), *_examine_meter(session)]
    except TargetError as failure:
        finding = f"{type(failure).__name__}: {failure}"
        name = "equipment" if isinstance(failure, Lacks) else "reachable"
        checks.append(Check(name=name, verdict="fail", finding=finding, advice=failure.hint))
        if troubles:
            advice = "fix the fault above, then run `rankship doctor` again"
            finding = quarantine.describe(troubles)
            checks.append(Check(name="quarantine", verdict="fail", finding=finding, advice=advice))
        return checks
    checks.append(Check(name="reachable", verdict="ok", finding=f"over {device.transport}"))
    if troubles:
        quarantine.clear(device)
        checks.append(Check(name="quarantine", verdict="ok", finding=f"cleared; {quarantine.describe(troubles)}"))
    return [*checks, *examine(device, probe), *found, examine_clock(probe.clock_utc_ns, asked_ns, answered_ns)]


def _examine_meter(session: "Session") -> "list[Check]":
    """Check whether the meter that the inventory names can be read, and which rails it has."""
    from rankship_targets.enrol.doctor import Check
    from rankship_targets.session.metered import check_meter

    choice = session.device.meter
    if choice is None:
        return []
    try:
        offer = check_meter(session)
    except (InputError, Lacks) as failure:
        return [Check(name="meter", verdict="warn", finding=str(failure), advice=failure.hint)]
    if offer is None:
        return [Check(name="meter", verdict="ok", finding=f"{choice.name}: its file is read after each trial")]
    rails = " + ".join(choice.rails or [channel.name for channel in offer.channels])
    finding = "; ".join([f"{choice.name} ({offer.provenance}): {rails}", *offer.notes])
    return [Check(name="meter", verdict="ok", finding=finding)]


def _examine_attachment(device: "Device") -> "list[Check]":
    """Check what adb sees of a phone, without connecting to it."""
    if device.transport != "adb" or device.twin is not None:
        return []
    from rankship_targets.enrol.doctor import examine_attached
    from rankship_targets.transport.adb.connection import list_attached

    return [examine_attached(device, list_attached())]


def _add(arguments: argparse.Namespace) -> None:
    """Add a device: refuse an entry that cannot be written, then pin, probe and write."""
    if sum(address is not None for address in (arguments.address, arguments.adb, arguments.twin)) != 1:
        raise InputError("name one way to the device", hint="give USER@HOST[:PORT], --adb SERIAL or --twin NAME")
    ssh_flags = ("key", "jump", "python", "fingerprint")
    given = [f"--{flag}" for flag in ssh_flags if getattr(arguments, flag) is not None]
    if given and arguments.address is None:
        raise InputError(f"{', '.join(given)}: only for a board over SSH", hint="remove it")

    from dataclasses import replace

    from rankship_targets.devices.inventory import refuse_known
    from rankship_targets.enrol import enrolment

    name, path = arguments.name, arguments.inventory or inventory_path()
    refuse_known(name, path)
    if arguments.twin:
        label = enrolment.enrol_twin(name, arguments.twin, path)
    elif arguments.adb:
        label = enrolment.enrol_phone(name, arguments.adb, path)
    else:
        device, notes = enrolment.resolve_address(name, arguments.address, arguments.jump, path)
        sys.stderr.writelines(f"{note}\n" for note in notes)
        if arguments.key is not None:
            device = replace(device, key_file=str(arguments.key.expanduser().absolute()))
        if arguments.python is not None:
            device = replace(device, python=arguments.python)
        label = enrolment.enrol_board(enrolment.pin_host_key(device, arguments.fingerprint, _ask), path)
    named = ["--inventory", str(arguments.inventory)] if arguments.inventory else []
    sys.stderr.write(f"added {name} to {path}: {label}\nnext: {quote_words(['rankship', 'doctor', name, *named])}\n")


def _ask(question: str) -> str:
    """Ask the user on the terminal; InputError if there is none."""
    sys.stderr.write(question)
    sys.stderr.flush()
    if not sys.stdin.isatty():
        sys.stderr.write("\n")
        hint = "compare it at the board's console and give it with --fingerprint SHA256:…"
        raise InputError("the host key must be confirmed, but there is no terminal to ask on", hint=hint)
    return sys.stdin.readline().strip()


def _list(inventory: "dict[str, Device]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("device", "kind", "over", "address", "label")
    for device in inventory.values():
        table.add_row(*map(escape, (device.name, _kind(device), device.transport, _address(device), device.label)))
    Console().print(table)


def _kind(device: "Device") -> str:
    if device.twin is not None:
        return f"twin of a {device.twin}"
    return {"local": "this host", "ssh": "board", "adb": "phone"}[device.transport]


def _address(device: "Device") -> str:
    if device.twin is not None or device.transport == "local":
        return ""
    if device.transport == "adb":
        return device.serial or ""
    through = f" through {device.jump}" if device.jump else ""
    return f"{device.user}@{device.host}:{device.port}{through}"
