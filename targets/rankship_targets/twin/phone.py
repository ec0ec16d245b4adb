"""The emulated phone's processes: `python -m rankship_targets.twin.phone ROOT FOLDER SCREEN`.

Prints {"port": of the phone, "server": port of its own adb server}, and ends when its stdin ends: no process is left
behind, however the process that started it dies.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from rankship_targets.twin.adbd import Adbd, Screen
from rankship_targets.twin.binfmt import (
    HOST_NAME,
    NO_DEVICES,
    NO_PROGRAMS,
    NO_SETUID,
    PIDS,
    bind,
    die_with_parent,
    enter_room,
    mount,
    unshare,
)

SHELL_USER = 2000
SDCARD_BYTES = 8_000_000
_GROUPS = (1004, 1007, 1011, 1015, 1028, 3001, 3002, 3003, 3006)
_DEVICES = ("null", "zero", "random", "urandom", "full", "tty")
_USB = Path("/dev/bus/usb")
# The processor and the kernel that every program of the phone sees.
EMULATION = {"QEMU_CPU": "cortex-a76", "QEMU_UNAME": "5.10.157-android13-4-rankship-twin"}


def main(root: Path, folder: Path, screen: Screen, adb: str) -> int:
    """Run the phone until stdin ends."""
    phone, server = _listen(), _listen()
    ports = {"port": phone.getsockname()[1], "server": server.getsockname()[1]}
    server.close()  # adb uses this port from here on

    def become_first() -> int:
        die_with_parent()
        mount("proc", Path("/proc"), "proc")
        _set_up(root, folder)
        _fork(lambda: _serve_adb(adb, folder, ports["server"]))
        daemon = _fork(lambda: _serve_phone(phone, folder / "root", screen))
        os.write(1, json.dumps(ports).encode() + b"\n")
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        return _reap_until(daemon)

    enter_room()
    unshare(PIDS | HOST_NAME)  # all processes inside end with the first one
    return os.waitstatus_to_exitcode(os.waitpid(_fork(become_first), 0)[1])


def _fork(job: Callable[[], int]) -> int:
    """Run `job` in a child process, which exits with its result and without the parent's clean-up."""
    child = os.fork()
    if child == 0:
        status = 70  # sysexits' "internal error"
        try:
            status = job()
        except BaseException:  # noqa: BLE001 - it must not return into the parent's code
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _reap_until(child: int) -> int:
    """Wait for every orphan, as a first process must, until `child` ends; returns the exit status of `child`."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


def _set_up(root: Path, folder: Path) -> None:
    """Mount the phone's files: its system read-only, everything else from the folder of this run."""
    inside = folder / "root"
    bind(root, inside, read_only=True)
    bind(folder / "data", inside / "data")
    condition = folder / "condition"
    bind(condition, inside / "condition", read_only=True)
    bind(condition / "sys", inside / "sys", read_only=True)
    mount("proc", inside / "proc", "proc")
    bind(condition / "proc/cpuinfo", inside / "proc/cpuinfo", read_only=True)
    mount("tmpfs", inside / "dev", "tmpfs", flags=NO_SETUID)
    for name in _DEVICES:
        (inside / "dev" / name).touch()
        bind(Path("/dev", name), inside / "dev" / name)
    card = f"size={SDCARD_BYTES},uid={SHELL_USER},gid={SHELL_USER},mode=770"
    mount("tmpfs", inside / "sdcard", "tmpfs", flags=NO_SETUID | NO_DEVICES | NO_PROGRAMS, options=card)
    if _USB.is_dir():  # two adb servers that see one cable would compete for it
        mount("tmpfs", _USB, "tmpfs")
    socket.sethostname("oriole")


def _serve_adb(adb: str, folder: Path, port: int) -> int:
    """Run an adb server that has no keys and looks for no emulators."""
    environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder), "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553"}
    with (folder / "adb.log").open("wb") as log:
        command = [adb, "-L", f"tcp:localhost:{port}", "nodaemon", "server"]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
        ).returncode


def _serve_phone(listener: socket.socket, root: Path, screen: Screen) -> int:
    os.environ.update(EMULATION)
    os.chroot(root)
    os.chdir("/")
    os.setgroups(_GROUPS)
    os.setgid(SHELL_USER)
    os.setuid(SHELL_USER)
    asyncio.run(_serve(listener, Adbd(screen)))
    return 0


async def _serve(listener: socket.socket, phone: Adbd) -> None:
    server = await asyncio.start_server(phone.serve, sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) != 4 or words[2] not in get_args(Screen):  # noqa: PLR2004 - as the docstring says
        sys.exit(__doc__)
    sys.exit(main(Path(words[0]), Path(words[1]), words[2], words[3]))  # type: ignore[arg-type]  # checked above
