"""The verbs about devices; what they need is imported when they run."""

import argparse
from pathlib import Path

from rankship_pipeline.errors import TargetError
from rankship_targets.device import find_device, load_inventory

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def devices(argv: list[str]) -> int:
    """Print the inventory."""
    parser = argparse.ArgumentParser(prog="rankship devices", description="List the devices of the inventory.")
    _add_inventory(parser)
    arguments = parser.parse_args(argv)
    inventory = load_inventory(arguments.inventory)

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("device", "over", "address", "label")
    for device in inventory.values():
        address = f"{device.user}@{device.host}:{device.port}" if device.transport == "ssh" else ""
        table.add_row(*map(escape, (device.name, device.transport, address, device.label)))
    Console().print(table)
    return 0


def doctor(argv: list[str]) -> int:
    """Probe a device and print every check; exit status 4 if one failed."""
    parser = argparse.ArgumentParser(prog="rankship doctor", description="Say why a device would give bad numbers.")
    parser.add_argument("device", help="a name from `rankship devices`")
    _add_inventory(parser)
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device, arguments.inventory)

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rankship_targets.doctor import Check, examine
    from rankship_targets.session import open_session

    try:
        with open_session(device) as session:
            reached = Check(name="reachable", verdict="ok", finding=f"over {device.transport}")
            checks = [reached, *examine(device, session.probe())]
    except TargetError as failure:
        finding = f"{type(failure).__name__}: {failure}"
        checks = [Check(name="reachable", verdict="fail", finding=finding, advice=failure.hint)]
    table = Table("check", "", "finding", "what to do", title=escape(f"{device.name} {device.label}".strip()))
    for check in checks:
        colour = _COLOURS[check.verdict]
        table.add_row(check.name, f"[{colour}]{check.verdict}[/]", escape(check.finding), escape(check.advice))
    Console().print(table)
    return TargetError.exit_code if any(check.verdict == "fail" for check in checks) else 0


def _add_inventory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inventory", type=Path, help="inventory file (default: $RANKSHIP_DEVICES, else the user's own)"
    )
