"""The process that keeps an emulated Pi: it starts its sshd, again after a reboot, and ends with the host process.

pi.py starts `python -m rankship_targets.twin.keeper '{…}'`. Three processes are above the Pi's own: the keeper in a
sandbox where aarch64 programs run, one guard per boot, and below it the Pi's first process, with which all processes
of that boot end. Each dies with the one above, however that one ends.
"""

import os
import select
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.frozen import record
from rankship_targets.twin.binfmt import (
    HOST_NAME,
    MOUNTS,
    PIDS,
    bind,
    die_with_parent,
    enter_room,
    mount,
    unmount,
    unshare,
)
from rankship_targets.twin.board import renew_boot_id

REBOOTED, ENDED = 10, 11  # a guard's exit status
BOOT_PAUSE_S = 1.0  # a board does not answer while it starts
DISK = "size=2g,mode=755"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "ptmx": "pts/ptmx"}


@record
class Plan:
    """What to run: the unpacked `root` (never written to), `state` for this run's own files, and the first program.

    `board` is the path of the board's files inside the Pi. `storage` is a folder of this host that outlives the Pi, at
    the path `stored` inside; None: everything written is lost.
    """

    host_pid: int
    root: str
    state: str
    board: str
    storage: str | None
    stored: str
    host_name: str
    argv: tuple[str, ...]
    environment: dict[str, str]


def main() -> None:
    """Keep the Pi that the JSON in argv describes until the host process ends or sends SIGTERM."""
    plan = decode(Plan, sys.argv[1], where="the keeper's plan")
    signal.signal(signal.SIGTERM, _leave)
    host = os.pidfd_open(plan.host_pid)
    if os.getppid() != plan.host_pid:  # it has already ended
        return
    state = Path(plan.state)
    try:
        enter_room()
        _lay_out(plan, state)
        while _boot(plan, host) == REBOOTED:
            renew_boot_id(state / "board")
            time.sleep(BOOT_PAUSE_S)
    finally:
        for name in ("root", "disk"):
            with suppress(OSError):  # it was not mounted
                unmount(state / name)
        shutil.rmtree(state, ignore_errors=True)
        if os.getppid() != plan.host_pid:  # no process is left that reads the log
            state.with_suffix(".log").unlink(missing_ok=True)


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _lay_out(plan: Plan, state: Path) -> None:
    """Mount the Pi's disk: the unpacked root, with everything written kept in memory."""
    disk, root = state / "disk", state / "root"
    disk.mkdir()
    root.mkdir()
    mount("tmpfs", disk, "tmpfs", options=DISK)
    (disk / "upper").mkdir()
    (disk / "work").mkdir()
    layers = f"lowerdir={plan.root},upperdir={disk}/upper,workdir={disk}/work,userxattr"
    mount("overlay", root, "overlay", options=layers)
    bind(state / "board", root / plan.board[1:])
    if plan.storage is not None:
        (root / plan.stored[1:]).mkdir(parents=True, exist_ok=True)
        bind(Path(plan.storage), root / plan.stored[1:])
    dev = root / "dev"
    mount("tmpfs", dev, "tmpfs", options="size=64m,mode=755")
    for name in _DEVICES:
        (dev / name).touch()
        bind(Path("/dev", name), dev / name)
    for name, target in _LINKS.items():
        (dev / name).symlink_to(target)
    (dev / "shm").mkdir(mode=0o1777)
    (dev / "shm").chmod(0o1777)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "devpts", options="newinstance,ptmxmode=0666,mode=620")


def _boot(plan: Plan, host: int) -> int:
    """Start a guard and wait for its end or the host's; returns the guard's exit status, or ENDED."""
    guard = os.fork()
    if guard == 0:
        _guard(plan)
    ended = os.pidfd_open(guard)
    poll = select.poll()
    for descriptor in (host, ended):
        poll.register(descriptor, select.POLLIN)
    try:
        happened = dict(poll.poll())
    finally:
        os.kill(guard, signal.SIGTERM)  # not reaped yet, so the pid is still its own
        status = os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])
        os.close(ended)
    return ENDED if host in happened else status


def _guard(plan: Plan) -> None:
    """Run one boot in its own namespaces; the exit status says how it ended."""
    status = ENDED
    try:
        die_with_parent()
        unshare(PIDS | MOUNTS | HOST_NAME)
        first = os.fork()
        if first == 0:
            _become_first(plan)

        def end(_number: int, _frame: FrameType | None) -> None:
            os.kill(first, signal.SIGKILL)

        signal.signal(signal.SIGTERM, end)
        ended = os.waitpid(first, 0)[1]
        # In a process namespace, reboot(2) ends the first process by SIGHUP, halting by SIGINT.
        if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGHUP:
            status = REBOOTED
    finally:
        os._exit(status)


def _become_first(plan: Plan) -> None:
    try:
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        socket.sethostname(plan.host_name)
        root = Path(plan.state) / "root"
        mount("proc", root / "proc", "proc")
        os.chroot(root)
        os.chdir("/")
        os.execve(plan.argv[0], plan.argv, plan.environment)  # noqa: S606 - an argument list is what we want
    except OSError as failure:
        print(f"the stand-in cannot start {plan.argv[0]}: {failure}", file=sys.stderr)  # noqa: T201 - its log
    finally:
        os._exit(127)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
