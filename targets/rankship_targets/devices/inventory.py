"""Edits the inventory: adds or removes one table, or sets one value, and leaves all other text as it is."""

import json
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from rankship_pipeline.foundation.codec import parse_toml
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable, write_atomic
from rankship_targets.devices.device import (
    THIS_MACHINE,
    check_name,
    find_device,
    inventory_path,
    load_inventory,
    read_inventory,
    refuse_open_folder,
)

Value = str | int | tuple[int, ...]
_PRIVATE = 0o600
_BARE = re.compile(r"[A-Za-z0-9_-]+")
# The one character that TOML requires escaped and JSON does not escape.
_DELETE = "\x7f"


def refuse_known(name: str, path: Path) -> None:
    """Refuse a name that cannot be added, before the device is contacted."""
    check_name(name, str(path))
    if name == THIS_MACHINE:
        raise InputError(f"{name!r} is built in", hint="give your device another name")
    if path.exists() and name in load_inventory(path):
        named = [] if path == inventory_path() else ["--inventory", path]
        remove = show_command("rankship", "devices", "remove", name, *named)
        raise InputError(f"{path} already has a device {name!r}", hint=f"run {remove} first")


def add_device(path: Path, name: str, table: Mapping[str, Value]) -> None:
    """Append one device's table; a new inventory is readable by its owner only."""
    with _holding(path) as target:
        refuse_known(name, target)
        before = read_inventory(target) if target.exists() else ""
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        after = before + _end_lines_as(before, gap + write_table(name, table))
        expected = {**parse_toml(before, str(target)), name: _as_toml_reads(table)}
        _replace(target, after, expected)


def remove_device(path: Path, name: str) -> None:
    """Remove one device's table; InputError if it is unknown, the jump host of another, or written unusually."""
    with _holding(path) as target:
        if name == THIS_MACHINE:
            raise InputError(f"{name!r} is built in", hint="it cannot be removed")
        find_device(name, target)
        behind = [one.name for one in load_inventory(target).values() if one.jump == name]
        if behind:
            hint = f"first remove {', '.join(behind)}, or change its `jump`"
            raise InputError(f"{', '.join(behind)} is reached through {name}", hint=hint)
        before = read_inventory(target)
        expected = {key: table for key, table in parse_toml(before, str(target)).items() if key != name}
        _replace(target, _cut_table(before, name), expected)


def set_value(path: Path, name: str, key: str, value: Value) -> None:
    """Set one key of a device's table; InputError if the device is unknown, or its table written unusually."""
    with _holding(path) as target:
        if name == THIS_MACHINE:
            raise InputError(f"{name!r} is built in", hint="it has no entry to change")
        find_device(name, target)
        before = read_inventory(target)
        expected = parse_toml(before, str(target))
        expected[name] = {**expected[name], key: _as_toml_reads({key: value})[key]}
        _replace(target, _write_line(before, name, key, f"{key} = {_write_value(value)}\n"), expected)


def write_table(name: str, table: Mapping[str, Value]) -> str:
    """Return one table as TOML."""
    heading = name if _BARE.fullmatch(name) else _quote(name)
    return "\n".join([f"[{heading}]", *(f"{key} = {_write_value(value)}" for key, value in table.items()), ""])


def _write_value(value: Value) -> str:
    if isinstance(value, str):
        return _quote(value)
    return str(value) if isinstance(value, int) else f"[{', '.join(map(str, value))}]"


def _quote(text: str) -> str:
    """Return a TOML basic string: the same as JSON's, except for one character."""
    return json.dumps(text, ensure_ascii=False).replace(_DELETE, "\\u007f")


def _as_toml_reads(table: Mapping[str, Value]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}


def _cut_table(text: str, name: str) -> str:
    """Return the text without a table and its subtables; blank lines and comments that follow them stay."""
    lines = text.splitlines(keepends=True)
    start, end = _find_table(lines, name, with_inner=True)
    return "".join(lines[:start] + lines[end:])


def _write_line(text: str, name: str, key: str, line: str) -> str:
    """Replace the line that sets this key, or add a line at the end of the table."""
    lines = text.splitlines(keepends=True)
    start, end = _find_table(lines, name)
    line = _end_lines_as(text, line)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += _end_lines_as(text, "\n")
    places = [number for number in range(start + 1, end) if _read_key(lines[number]) == key]
    first, after = (places[0], places[0] + 1) if places else (end, end)
    return "".join([*lines[:first], line, *lines[after:]])


def _end_lines_as(text: str, added: str) -> str:
    """Return what is added with the line ends of the text: Windows' in a file that was saved there."""
    return added.replace("\n", "\r\n") if "\r\n" in text else added


def _find_table(lines: Sequence[str], name: str, *, with_inner: bool = False) -> tuple[int, int]:
    """Return a table's first line and the one after its last, leaving out blanks and comments; 0, 0: not found.

    `with_inner` includes the subtables that follow directly: [pi4.meter] after [pi4].
    """
    headings = [(number, _read_heading(lines, number)) for number in range(len(lines))]
    starts = [number for number, heading in headings if heading == name]
    if not starts:
        return 0, 0
    own = {None, name} if with_inner else {None}
    ends = [number for number, heading in headings if heading not in own and number > starts[0]]
    end = ends[0] if ends else len(lines)
    while end > starts[0] + 1 and lines[end - 1].lstrip()[:1] in {"", "#"}:
        end -= 1
    return starts[0], end


def _read_key(line: str) -> str | None:
    """Return the key that a line sets; None if the line alone is not valid TOML."""
    try:
        return next(iter(tomllib.loads(line)), None)
    except tomllib.TOMLDecodeError:
        return None


def _read_heading(lines: Sequence[str], number: int) -> str | None:
    """Return the first name of a heading such as `[pi4]  # mine`; None for other lines and inside long strings."""
    if not lines[number].lstrip().startswith("["):
        return None
    try:
        tomllib.loads("".join(lines[:number]))
        tables = tomllib.loads(lines[number])
    except tomllib.TOMLDecodeError:
        return None
    return next(iter(tables), None)


def _replace(path: Path, text: str, expected: Mapping[str, Any]) -> None:
    """Write the new text, after checking that it parses to exactly what is expected."""
    try:
        fits = tomllib.loads(text) == expected
        data = text.encode()
    except (tomllib.TOMLDecodeError, UnicodeEncodeError):
        fits, data = False, b""
    if not fits:
        message = f"{path} is written in a way that cannot be edited automatically: nothing was changed"
        raise InputError(message, hint="edit it by hand: one [table] for each device")
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else _PRIVATE
    write_atomic(path, data, mode=mode)


@contextmanager
def _holding(path: Path) -> Iterator[Path]:
    """Lock the inventory against other writers; yields the real path, behind symbolic links."""
    target = path.resolve()
    ensure_writable(target.parent, "--inventory")
    refuse_open_folder(target.parent)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield target
