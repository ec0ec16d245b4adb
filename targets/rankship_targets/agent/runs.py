"""Detached runs, as recorded in their folders, and the commands `fetch` and `cancel`.

<workdir>/run.lock                 locked (flock) by the one process that measures; holds the run's name
<workdir>/runs/<run>/state.json    process, its start time, boot and request
<workdir>/runs/<run>/events.jsonl  the run's events so far; an incomplete last line is not sent
<workdir>/runs/<run>/errors.txt    what the run printed
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

from .protocol import Event, Fault, Request
from .system import read_boot_id

STATE, EVENTS, ERRORS = "state.json", "events.jsonl", "errors.txt"
MARK = "RANKSHIP_RUN"  # in the environment of every program that a run starts
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5  # between two reads of a run without new events
END_TIMEOUT_S = 20.0
READ_BYTES, SHOWN_CHARACTERS = 1 << 16, 2000  # of the end of what a run printed
CRASH = "Fatal Python error"  # what faulthandler prints on a signal that the program itself caused
LAST = {"done", "error"}


def find_folder(request: Request) -> str:
    """Return a run's folder; Fault bad_request if its name is not a plain one."""
    if not NAME.fullmatch(request["run"]):
        raise Fault("bad_request", f"not a run's name: {request['run']!r}")
    return f"{request['workdir']}/runs/{request['run']}"


def fetch(request: Request) -> Iterator[Event]:
    """Yield a run's events from the one with this number on, until its last."""
    folder, offset, position, pause_s = find_folder(request), request["offset"], 0, FIRST_PAUSE_S
    state = read_state_file(folder)
    if state is None or offset < 0:
        raise Fault("unknown_run", f"there is no run {request['run']}")
    while True:
        alive = is_alive(state)  # checked before reading, so that a dying process's last events are not missed
        events, position = read_events(folder, position)
        yield from events[offset:]
        if events and events[-1]["event"] in LAST:
            return
        offset = max(0, offset - len(events))
        if not alive:
            raise explain_end(folder, state, request["run"])
        pause_s = FIRST_PAUSE_S if events else min(2 * pause_s, LONGEST_PAUSE_S)
        time.sleep(pause_s)


def cancel(request: Request) -> Iterator[Event]:
    """End a run if it is still going on, and remove its folder; a missing run counts as cancelled."""
    folder = find_folder(request)
    state = read_state_file(folder)
    if state is not None:
        end_run(state, request["run"])
    remove_folder(folder)
    yield {"event": "done"}


def remove_folder(folder: str) -> None:
    """Remove a run's folder, its state file first: a run that is half removed is unknown, not dead."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{folder}/{STATE}")  # noqa: PTH108 - names, not paths
    shutil.rmtree(folder, ignore_errors=True)


def read_state_file(folder: str) -> Event | None:
    """Read the state file in a run's folder; None if there is no run."""
    try:
        with open(f"{folder}/{STATE}", encoding="utf-8") as stream:  # noqa: PTH123 - names, not paths
            state = json.load(stream)
        known = type(state["pid"]) is int and {"started", "boot", "born", "request"} <= set(state)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return state if known else None


def read_events(folder: str, position: int) -> tuple[list[Event], int]:
    """Read the complete lines from a position in the file on, and their end; Fault agent_died for a damaged line."""
    try:
        with open(f"{folder}/{EVENTS}", "rb") as stream:  # noqa: PTH123 - as above
            stream.seek(position)
            whole, newline, _ = stream.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], position
    return [parse_line(line) for line in whole.split(b"\n")] if newline else [], position + len(whole + newline)


def parse_line(line: bytes) -> Event:
    """Parse one stored event; Fault agent_died if a power cut damaged it."""
    try:
        event: Any = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise Fault("agent_died", f"the run's events are damaged: {line[:80]!r}")
    return event


def is_finished(folder: str) -> bool:
    """Return whether a run has written its last event."""
    try:
        events, _ = read_events(folder, 0)
    except Fault:
        return False
    return bool(events) and events[-1]["event"] in LAST


def is_alive(state: Event) -> bool:
    """Return whether the process that was started still runs, and not another with its number."""
    started = read_start(state["pid"])
    return started is not None and started == state["started"] and state["boot"] == read_boot_id()


def explain_end(folder: str, state: Event, run: str) -> Fault:
    """Return why a run ended without a last event."""
    if state["boot"] != read_boot_id():
        return Fault("rebooted", f"the device was restarted during run {run}")
    try:
        with open(f"{folder}/{ERRORS}", "rb") as stream:  # noqa: PTH123 - as above
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - READ_BYTES))
            printed = stream.read().decode("utf-8", "replace").strip()
    except OSError:
        printed = ""
    if CRASH in printed:
        return Fault("failed", f"the runtime crashed: {printed[printed.rindex(CRASH) :][:SHOWN_CHARACTERS]}")
    shown = f"; it printed: {printed[-SHOWN_CHARACTERS:]}" if printed else ""
    return Fault("agent_died", f"process {state['pid']} of run {run} ended without a last event{shown}")


def end_run(state: Event, run: str) -> None:
    """Kill the processes that a run started, and no others, and wait until they are gone."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while True:
        left = [state["pid"]] if is_alive(state) else find_left(state, run)
        if not left:
            return
        if time.monotonic() >= deadline:
            raise Fault("failed", f"processes {left} of run {run} do not end")
        for pid in left:
            end = os.killpg if pid == state["pid"] else os.kill  # the run's own process leads its process group
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)
        time.sleep(FIRST_PAUSE_S)


def find_left(state: Event, run: str) -> list[int]:
    """Find processes that outlived the run's own: in its session, with its mark in their environment."""
    if state["boot"] != read_boot_id():
        return []
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - as above
    return [pid for pid in pids if read_session(pid) == state["pid"] and has_mark(pid, run)]


def has_mark(pid: int, run: str) -> bool:
    """Return whether a process was started by a run."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:  # noqa: PTH123 - as above
            return f"{MARK}={run}".encode() in stream.read().split(b"\0")
    except OSError:
        return False


def read_start(pid: int) -> int | None:
    """Read when a process was started, in clock ticks since boot; None if it is gone or a zombie."""
    fields = read_process(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def read_session(pid: int) -> int | None:
    """Read a process's session; None if it is gone or a zombie."""
    fields = read_process(pid)
    return int(fields[3]) if fields and fields[0] not in "ZX" else None


def read_process(pid: int) -> list[str]:
    """Read the fields of /proc/PID/stat from the process's state on: the name before may contain anything."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 - as above
            return stream.read().rpartition(")")[2].split()
    except OSError:
        return []
