"""A namespace of our own, in which the kernel runs aarch64 programs by emulation; nothing outside it changes.

The kernel keeps binfmt_misc per user namespace since Linux 6.7, so that an emulator registered
inside is unknown outside.
"""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rankship_pipeline.errors import Lacks

QEMU = Path("/usr/bin/qemu-aarch64-static")
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_REMOUNT, MS_RDONLY = 2, 4, 8, 4096, 16384, 32, 1
_MS_PRIVATE = 1 << 18
_CLONE_FLAGS = 0x20000 | 0x04000000 | 0x10000000 | 0x20000000  # mounts, host name, users, processes
_PR_SET_PDEATHSIG = 1
_IDS = 65536  # as many users and groups as a system's own
_REGISTER = Path("/proc/sys/fs/binfmt_misc/register")
# A little-endian 64-bit ELF file for aarch64, whatever its ABI; F: the emulator is opened now, so it works in any root.
_MAGIC = rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
_FORMAT = b":qemu-aarch64:M::%s:%s:%s:OPF"
# The flags of a mount that a namespace may not take away, as statvfs tells them and as mount(2) wants them.
_LOCKED = {2: MS_NOSUID, 4: MS_NODEV, 8: MS_NOEXEC, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_libc = ctypes.CDLL(None, use_errno=True)


def enter_namespace(init: Callable[[], int]) -> int:
    """Run `init` as the first process of a new namespace and give its exit status; with it, everything inside ends.

    Lacks where the kernel or this user's rights do not allow it.
    """
    try:
        _unshare()
    except OSError as failure:
        message = f"cannot make a namespace for the emulated device: {failure.strerror}"
        raise Lacks(message, hint="it needs root, Linux 6.7 or newer, and user namespaces allowed") from None
    child = os.fork()
    if child == 0:
        _exit_with(lambda: _become_first(init))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run_reaping(child: int) -> int:
    """Wait as the first process must: for every orphan, until `child` ends; gives its exit status."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def fork(job: Callable[[], int]) -> int:
    """Run `job` in a child process and give its id."""
    child = os.fork()
    if child == 0:
        _exit_with(job)
    return child


def mount(source: str, target: Path, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    """Put a file system in its place with the system call of that name; OSError names the place."""
    words = [None if word is None else os.fsencode(word) for word in (source, str(target), kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def bind(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Show `source` at `target` too."""
    mount(str(source), target, flags=MS_BIND)
    if read_only:
        kept = sum(flag for told, flag in _LOCKED.items() if os.statvfs(target).f_flag & told)
        mount("none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def _unshare() -> None:
    """Leave for new namespaces, in which every user and group keeps its number."""
    told_read, told_write = os.pipe()
    parent = os.getpid()
    # The maps must be written from outside, once the namespace is there.
    helper = fork(lambda: _map_ids(parent, told_read))
    _check(_libc.unshare(_CLONE_FLAGS), "unshare")
    os.write(told_write, b"x")
    _, status = os.waitpid(helper, 0)
    os.close(told_read)
    os.close(told_write)
    if status != 0:
        raise OSError(0, "the numbers of users and groups could not be mapped")
    mount("none", Path("/"), flags=MS_REC | _MS_PRIVATE)


def _map_ids(process: int, told: int) -> int:
    os.read(told, 1)
    for name in ("uid_map", "gid_map"):
        Path("/proc", str(process), name).write_text(f"0 0 {_IDS}\n", encoding="ascii")
    return 0


def _become_first(init: Callable[[], int]) -> int:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    mount("proc", Path("/proc"), "proc")
    mount("binfmt_misc", _REGISTER.parent, "binfmt_misc")
    # In one write: the kernel takes each write for a whole registration.
    _REGISTER.write_bytes(_FORMAT % (_MAGIC, _MASK, os.fsencode(QEMU)))
    return init()


def _exit_with(job: Callable[[], int]) -> NoReturn:
    """End this forked process with what `job` gives, whatever happens, without its parent's clean-up."""
    status = 70  # sysexits' "internal error"
    try:
        status = job()
    except BaseException:  # noqa: BLE001 - it must not return into the parent's code
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
