"""The usual stand-in for a Raspberry Pi 4: Debian's own arm64 programs, translated by qemu, behind a real sshd.

It shows that the code runs on a Cortex-A72 and that the transport works. Its times, temperature and memory figures mean
nothing; the system stand-in (machine.py) has real memory figures.
"""

import atexit
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import InputError, Unreachable
from rankship_targets.devices.device import Device
from rankship_targets.twin.banner import await_banner, find_free_port
from rankship_targets.twin.binfmt import check_machine
from rankship_targets.twin.board import KERNEL, write_board
from rankship_targets.twin.cache import find_storage, twins_folder
from rankship_targets.twin.debian_root import (
    BOARD,
    PATH,
    PYTHON,
    STAND_IN,
    USER,
    USER_ID,
    find_root,
    read_public_key,
)
from rankship_targets.twin.ending import end_stand_in
from rankship_targets.twin.keeper import Plan

START_TIMEOUT_S = 60.0
EMULATION = {"QEMU_CPU": "cortex-a72", "QEMU_LD_PREFIX": BOARD, "QEMU_UNAME": KERNEL, "PATH": PATH}
# The keys of the inventory's entry that also apply to a Pi that is already running.
_OF_THE_ENTRY = ("workdir", "cpus", "governor", "cool_below_mc", "twin", "label")
_SSHD = ("/usr/sbin/sshd", "-D", "-e", "-o", "ListenAddress=127.0.0.1")
_SETTINGS = {
    "UsePAM": "no",
    "PidFile": "none",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "PermitRootLogin": "prohibit-password",
    "MaxStartups": "100",
    "SetEnv": " ".join(f"{name}={value}" for name, value in EMULATION.items()),
}


@dataclass(frozen=True)
class _Running:
    keeper: subprocess.Popen[bytes]
    state: Path
    device: Device
    owner_pid: int  # a forked child inherits this table and must not end these


_RUNNING: dict[str, _Running] = {}
_STARTING = threading.Lock()


def start_pi(device: Device) -> Device:
    """Start a Pi of this name unless this process already runs it; it ends with this process in any case.

    A Pi of the inventory keeps what it stored below ~/.cache; others start empty.
    """
    with _STARTING:
        running = _RUNNING.get(device.name)
        if running is None or running.owner_pid != os.getpid() or running.keeper.poll() is not None:
            running = _start(device)
            _RUNNING[device.name] = running
        kept = {name: getattr(device, name) for name in _OF_THE_ENTRY}
        # A name without a folder is found on the Pi's PATH, where the root's own runtimes come first.
        python = device.python if "/" in device.python else PYTHON
        return replace(running.device, **kept, python=python)


def stop_pi(device: Device) -> None:
    """End the Pi of this name, as if its plug were pulled; what was written to its disk is lost."""
    with _STARTING:
        running = _RUNNING.pop(device.name, None)
        if running is not None and running.owner_pid == os.getpid():
            _end(running)


def overlay_folder(device: Device) -> Path:
    """Return where this host keeps a running Pi's board files (named in board.py): the Pi shows changes to them."""
    return _find(device).state / "board"


def log_file(device: Device) -> Path:
    """Return the log of a running Pi's sshd and keeper."""
    return _find(device).state.with_suffix(".log")


def _find(device: Device) -> _Running:
    if device.name not in _RUNNING:
        raise InputError(f"this process runs no stand-in named {device.name!r}", hint="start it with start_pi")
    return _RUNNING[device.name]


def _start(device: Device) -> _Running:
    check_machine(STAND_IN)
    made = find_root()
    port = find_free_port()
    folder = twins_folder() / "running"
    _remove_leftovers(folder)
    state = folder / f"{device.name}-{os.getpid()}-{secrets.token_hex(4)}"
    state.mkdir(parents=True)
    write_board(state / "board")
    plan = Plan(
        host_pid=os.getpid(),
        root=str(made / "root"),
        state=str(state),
        board=BOARD,
        storage=str(_make_storage(device)) if device.twin is not None else None,
        stored=f"/home/{USER}/.cache",
        host_name="raspberrypi",
        argv=(*_SSHD, "-p", str(port), *(part for pair in _SETTINGS.items() for part in ("-o", "=".join(pair)))),
        environment=EMULATION,
    )
    argv = [sys.executable, "-m", "rankship_targets.twin.keeper", encode(plan)]
    log = state.with_suffix(".log")  # beside the folder, which the keeper removes
    with log.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the keeper inherits it, so it is held while any process of this Pi runs
        keeper = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True)
    reached = replace(
        device,
        transport="ssh",
        host="127.0.0.1",
        port=port,
        user=USER,
        host_key=read_public_key(made / "keys/host"),
        key_file=str(made / "keys/user"),
    )
    running = _Running(keeper=keeper, state=state, device=reached, owner_pid=os.getpid())
    if not await_banner(port, alive=lambda: keeper.poll() is None, timeout_s=START_TIMEOUT_S):
        said = log.read_text(errors="replace")[-1500:]
        _end(running)
        message = f"the stand-in {device.name} did not start: {said.strip()}"
        raise Unreachable(message, hint="it needs root and Linux 6.7 or newer, or a registered qemu-aarch64")
    return running


def _make_storage(device: Device) -> Path:
    """Make the folder that a Pi of the inventory keeps from one start to the next, like a board's card."""
    folder = find_storage(device.name)
    folder.mkdir(parents=True, exist_ok=True)
    os.chown(folder, USER_ID, USER_ID)
    return folder


def _remove_leftovers(folder: Path) -> None:
    """Remove the files that a killed keeper left: a few kilobytes, beside a log that no process locks any more."""
    for log in folder.glob("*.log"):
        with suppress(OSError), log.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(log.with_suffix(""), ignore_errors=True)
            log.unlink()


def _end(running: _Running) -> None:
    """End the keeper, and with it all processes of the Pi."""
    end_stand_in(running.keeper, running.state)
    running.state.with_suffix(".log").unlink(missing_ok=True)


@atexit.register
def _end_all() -> None:
    for running in list(_RUNNING.values()):
        if running.owner_pid == os.getpid():
            _end(running)
