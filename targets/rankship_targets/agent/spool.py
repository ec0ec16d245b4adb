"""The command `spool`: carries out a request in a separate process, which outlives the connection.

Its events go to a file instead of the host, each on disk before the next; `fetch` reads them there. The parent records
the child's process id before it lets the child begin, so `cancel` finds everything that runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

from .files import sync_folder, write_durably
from .protocol import Event, Fault, Request
from .runs import (
    ERRORS,
    EVENTS,
    MARK,
    STATE,
    end_run,
    find_folder,
    is_finished,
    read_start,
    read_state_file,
    remove_folder,
)
from .system import read_boot_id

LOCK = "run.lock"
KEPT_S = 7 * 24 * 3600  # how long a run that nobody fetched is kept
RESERVE, RESERVE_BYTES = "reserve", 1 << 16  # a file deleted when the disk is full, so that the run can report this
GO = b"go"

CarryOut = Callable[[str], Iterator[Event]]


def spool(request: Request, carry_out: CarryOut) -> Iterator[Event]:
    """Start a request as a detached run, unless it is going on or finished; a run that died is started again."""
    folder, run = find_folder(request), request["run"]
    os.makedirs(f"{request['workdir']}/runs", exist_ok=True)  # noqa: PTH103 - names, not paths
    known = read_state_file(folder)
    if known is not None and known["request"] != request["request"]:
        raise Fault("bad_request", f"run {run} was started with another request")
    lock = os.open(f"{request['workdir']}/{LOCK}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode("utf-8", "replace")
        known = read_state_file(folder)
        if holder != run or known is None:
            raise Fault("busy", f"run {holder} is going on") from None
        born = known["born"]
    else:
        if known is not None and is_finished(folder):
            born = known["born"]
        else:
            remove_old_runs(request["workdir"], run)
            if known is not None:
                end_run(known, run)
            remove_folder(folder)
            born = start(folder, request, carry_out, lock)
    finally:
        os.close(lock)  # the child still holds it
    yield {"event": "spooled", "born": born}
    yield {"event": "done"}


def start(folder: str, request: Request, carry_out: CarryOut, lock: int) -> str:
    """Start the process that does the work, recording its id before it begins; returns a new id of this start."""
    os.mkdir(folder)  # noqa: PTH102 - as above
    with open(f"{folder}/{RESERVE}", "wb") as stream:  # noqa: PTH123 - as above
        stream.write(bytes(RESERVE_BYTES))
    os.ftruncate(lock, 0)
    os.pwrite(lock, request["run"].encode(), 0)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writing)
            os.setsid()
            if os.read(reading, len(GO)) == GO:  # empty if the parent failed
                work(folder, request, carry_out, lock)
        finally:
            os._exit(0)
    os.close(reading)
    born = os.urandom(8).hex()
    try:
        # The start time is read from outside: an emulator may show a process another one for itself.
        state = {"pid": pid, "started": read_start(pid), "boot": read_boot_id(), "born": born}
        write_durably(f"{folder}/{STATE}", json.dumps({**state, "request": request["request"]}))
        sync_folder(f"{request['workdir']}/runs")
        os.write(writing, GO)
    finally:
        os.close(writing)
    return born


def work(folder: str, request: Request, carry_out: CarryOut, lock: int) -> None:
    """Carry out the request without a connection to the host; its events go to the run's folder."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    errors = os.open(f"{folder}/{ERRORS}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open("/dev/null", os.O_RDONLY)
    for descriptor, target in ((null, 0), (errors, 1), (errors, 2)):
        os.dup2(descriptor, target)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - as above
        if int(name) > 2 and int(name) != lock:  # noqa: PLR2004 - stderr
            with contextlib.suppress(OSError):
                os.close(int(name))
    faulthandler.enable(file=2)
    os.environ[MARK] = request["run"]
    try:
        for event in carry_out(json.dumps(request["request"])):
            append(folder, event)
    except OSError as failure:
        kind = "no_space" if release(folder) else "failed"
        append(folder, {"event": "error", "kind": kind, "message": f"the run's events: {failure.strerror}"})
    release(folder)
    sys.stdout.flush()  # what runtimes printed


def append(folder: str, event: Event) -> None:
    """Append an event and return when it is on disk; a partly written one is removed."""
    stream = os.open(f"{folder}/{EVENTS}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    size = os.fstat(stream).st_size
    line = memoryview((json.dumps(event) + "\n").encode())
    try:
        while line:
            line = line[os.write(stream, line) :]
        os.fsync(stream)
    except OSError:
        os.ftruncate(stream, size)
        raise
    finally:
        os.close(stream)


def release(folder: str) -> bool:
    """Delete the reserve; False if it was deleted before."""
    try:
        os.unlink(f"{folder}/{RESERVE}")  # noqa: PTH108 - as above
    except FileNotFoundError:
        return False
    return True


def remove_old_runs(workdir: str, run: str) -> None:
    """Remove runs that nobody fetched within KEPT_S; none is going on, because this process holds the lock."""
    for name in os.listdir(f"{workdir}/runs"):  # noqa: PTH208 - as above
        folder = f"{workdir}/runs/{name}"
        with contextlib.suppress(OSError):
            if name != run and time.time() - os.stat(folder).st_mtime > KEPT_S:  # noqa: PTH116 - as above
                remove_folder(folder)
