"""The commands `tune` and `restore`: set the frequency governor for a session, and set it back.

A note in the working directory records what to restore, so that the next session can do it if this one's host dies.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

from .files import write_durably
from .protocol import Event, Request
from .state import read_governor
from .system import ROOT, find_paths, read_boot_id, read_text

NOTE = "governor.json"
PATTERN = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"


def tune(request: Request) -> Iterator[Event]:
    """Set every core's governor, after noting the present ones."""
    note, wanted = f"{request['workdir']}/{NOTE}", request["governor"]
    found = {path: read_text(path) for path in find_paths(PATTERN)}
    before = read_note(note)
    unmet = [] if found else [f"governor {wanted}: the device has none to set"]
    if any(governor != wanted for governor in found.values()):
        write_durably(note, json.dumps({"boot": read_boot_id(), "governors": {**found, **before}}))
        unmet = [failure for path in sorted(found) for failure in write_governor(path, wanted)]
        if len(unmet) == len(found) and not before:  # nothing was changed, so there is nothing to restore
            os.unlink(note)  # noqa: PTH108 - as above
    yield {"event": "tuned", "governor": read_governor(), "unmet": sorted(set(unmet))}
    yield {"event": "done"}


def restore(request: Request) -> Iterator[Event]:
    """Set every core's governor to the noted one, if there is a note; a reboot has restored them already."""
    note = f"{request['workdir']}/{NOTE}"
    unmet = [failure for path, governor in read_note(note).items() for failure in write_governor(path, governor)]
    if not unmet:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note)  # noqa: PTH108 - names, not paths
    yield {"event": "tuned", "governor": read_governor(), "unmet": sorted(set(unmet))}
    yield {"event": "done"}


def read_note(path: str) -> dict[str, str]:
    """Return what to restore, by each core's file; empty without a note, or if it is from an earlier boot."""
    try:
        with open(path, encoding="utf-8") as stream:  # noqa: PTH123 - as above
            note = json.load(stream)
        known = set(find_paths(PATTERN))  # no other file may be written
        governors = {core: text for core, text in note["governors"].items() if core in known and type(text) is str}
        return governors if note["boot"] == read_boot_id() else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_governor(path: str, governor: str) -> list[str]:
    """Set one core's governor; returns why it could not be set."""
    try:
        with open(ROOT + path, "w", encoding="ascii") as stream:  # noqa: PTH123 - as above
            stream.write(governor)
    except (OSError, ValueError) as failure:
        known = read_text(path.replace("scaling_governor", "scaling_available_governors"))
        available = f" (available: {known})" if known else ""
        return [f"governor {governor}: {getattr(failure, 'strerror', None) or failure}{available}"]
    return []
