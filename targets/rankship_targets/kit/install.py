"""Installs a kit on a device: copies it, unpacks it, checks that it runs, and only then renames it into place."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources import as_file, files
from pathlib import Path

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import NoSpace, TargetError, WrongSystem
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FACTS, FORMATS
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_bytes
from rankship_targets.devices.device import Device
from rankship_targets.kit.build import RUNNER_ARCHIVE
from rankship_targets.kit.lock import KitFile, KitLock
from rankship_targets.kit.system import Board, ask_board, ask_system
from rankship_targets.kit.unpack import EXIT_UNFIT
from rankship_targets.transport.copying import copy_verified
from rankship_targets.transport.lease import Lease, describe_owner
from rankship_targets.transport.protocol import (
    STEP_TIMEOUT_S,
    Transport,
    explain_failure,
    hash_many,
    run_checked,
)

UNPACK_TIMEOUT_S = 900.0
# Makes a folder and prints its absolute path, in every shell.
_RESOLVE = 'mkdir -p -- "$1" && cd -- "$1" && pwd -P'
Say = Callable[[str], None]


@record
class Installed:
    """An installed kit: the interpreter to name in the inventory, and the bytes that were copied."""

    python: str
    sent_bytes: int
    was_there: bool


def install_kit(transport: Transport, device: Device, lock: KitLock, folder: Path, say: Say) -> Installed:
    """Install a kit unless the device has it already; an interrupted installation leaves no partial kit."""
    workdir = run_checked(transport, ["sh", "-c", _RESOLVE, "sh", device.workdir]).strip()
    home = f"{workdir}/kits/{lock.name}"
    python = f"{home}/bin/python" if isinstance(lock.system, Board) else f"{home}/py.sh"
    if _is_there(transport, home, lock):
        return Installed(python=python, sent_bytes=0, was_there=True)
    _check_system(transport, device, lock)
    with _hold(transport, device, workdir):
        sent = _copy(transport, lock, folder, workdir, say)
        say("unpacking and checking it on the device")
        if isinstance(lock.system, Board):
            _unpack_on_board(transport, device, lock, home)
        else:
            _unpack_on_phone(transport, device, lock, home)
    return Installed(python=python, sent_bytes=sent, was_there=False)


def write_check(lock: KitLock) -> str:
    """Return Python code that fails if a runtime of the kit does not run."""
    return "; ".join(["import numpy, psutil", *(FACTS[known].kit_check for known in FORMATS if known in lock.runtimes)])


def _is_there(transport: Transport, home: str, lock: KitLock) -> bool:
    """Return whether the kit is complete: its lock is there only after the rename that ends an installation."""
    done = transport.run(["cat", "--", f"{home}/lock.json"], timeout_s=STEP_TIMEOUT_S)
    return done.code == 0 and done.stdout == encode(lock)


def _check_system(transport: Transport, device: Device, lock: KitLock) -> None:
    found = ask_system(transport, device)
    if found != lock.system:
        message = f"{device.name} is {found}; the kit {lock.name} was built for {lock.system}"
        raise WrongSystem(message, hint=f"build it again: {show_command('rankship', 'kit', 'build', device.name)}")


@contextmanager
def _hold(transport: Transport, device: Device, workdir: str) -> Iterator[None]:
    """Hold the device's lease, so that no measurement and no second installation runs at the same time."""
    lease = Lease(device=device, folder=f"{workdir}/lease", owner=describe_owner())
    lease.take(transport)
    try:
        yield
    finally:
        with suppress(TargetError):
            lease.release(transport)


def _copy(transport: Transport, lock: KitLock, folder: Path, workdir: str, say: Say) -> int:
    """Copy every file that is not there yet; returns the bytes sent."""
    there = hash_many(transport, [_remote_path(workdir, file) for file in lock.files])
    missing = [file for file in lock.files if there.get(_remote_path(workdir, file)) != file.sha256]
    needed = sum(file.size_bytes for file in missing) + sum(file.unpacked_bytes for file in lock.files)
    free = transport.free_bytes(workdir)
    if free < needed:
        message = f"{workdir} has {show_bytes(free)} free, the kit needs {show_bytes(needed)} to be installed"
        raise NoSpace(message, hint="free space on the device or choose another workdir in the inventory")
    for position, file in enumerate(missing, 1):
        say(f"copying {file.name}, {show_bytes(file.size_bytes)} ({position} of {len(missing)})")
        copy_verified(transport, folder / file.name, _remote_path(workdir, file), file.sha256)
    return sum(file.size_bytes for file in missing)


def _remote_path(workdir: str, file: KitFile) -> str:
    return f"{workdir}/kits/files/{file.sha256}/{file.name}"


def _unpack_on_board(transport: Transport, device: Device, lock: KitLock, home: str) -> None:
    workdir = home.removesuffix(f"/kits/{lock.name}")
    _, interpreter = ask_board(transport, device)
    resources = files("rankship_targets") / "kit"
    launcher = (resources / "launch-board.sh").read_text(encoding="utf-8")
    request = {
        "kit": home,
        "lock": encode(lock),
        "wheels": [_remote_path(workdir, file) for file in lock.files if file.name != RUNNER_ARCHIVE],
        "programs": [_remote_path(workdir, file) for file in lock.files if file.name == RUNNER_ARCHIVE],
        "launcher": launcher.replace("@INTERPRETER@", shlex.quote(interpreter)),
        "check": write_check(lock),
    }
    with as_file(resources / "unpack.py") as script:
        sha256 = hash_file(script)
        remote = f"{workdir}/kits/files/{sha256}/unpack.py"
        copy_verified(transport, script, remote, sha256)
    done = transport.run([interpreter, remote, json.dumps(request)], timeout_s=UNPACK_TIMEOUT_S)
    if done.code == EXIT_UNFIT:
        raise _explain_unfit(device, lock, done.stderr)
    if done.code != 0:
        raise explain_failure([interpreter, remote], done.code, done.stderr)


def _unpack_on_phone(transport: Transport, device: Device, lock: KitLock, home: str) -> None:
    """Unpack the one archive with the phone's own tar, and check it with the bundle's own Python."""
    workdir = home.removesuffix(f"/kits/{lock.name}")
    (archive,) = (_remote_path(workdir, file) for file in lock.files)
    part = f"{home}.part"
    run_checked(transport, ["rm", "-rf", "--", part])
    run_checked(transport, ["mkdir", "--", part])
    try:
        run_checked(transport, ["tar", "-x", "-f", archive, "-C", part], timeout_s=UNPACK_TIMEOUT_S)
        _check_on_phone(transport, device, lock, part)
        _write_lock(transport, lock, part)
        run_checked(transport, ["mv", "--", part, home])
    except BaseException:
        with suppress(TargetError):
            transport.run(["rm", "-rf", "--", part], timeout_s=STEP_TIMEOUT_S)
        raise
    run_checked(transport, ["rm", "-rf", "--", archive.rpartition("/")[0]])  # it takes as much space as the kit


def _check_on_phone(transport: Transport, device: Device, lock: KitLock, part: str) -> None:
    done = transport.run(["sh", f"{part}/py.sh", "-c", write_check(lock)], timeout_s=UNPACK_TIMEOUT_S)
    if done.code != 0:
        raise _explain_unfit(device, lock, done.stderr)


def _write_lock(transport: Transport, lock: KitLock, part: str) -> None:
    """Write the lock into the kit, as its last file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "lock.json"
        note.write_text(encode(lock), encoding="utf-8")
        copy_verified(transport, note, f"{part}/lock.json", hash_file(note))


def _explain_unfit(device: Device, lock: KitLock, said: str) -> WrongSystem:
    message = f"the kit {lock.name} does not run on {device.name}: {said.strip()[-800:]}"
    return WrongSystem(message, hint="nothing was installed; the device's own message is above")
