"""A sandbox of namespaces in which the kernel runs aarch64 programs through qemu; nothing outside it changes.

Since Linux 6.7 every user namespace may have its own binfmt_misc. On older kernels the sandbox relies on what is
registered on the machine.
"""

import ctypes
import os
import shutil
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError

INTERPRETER = Path("/usr/libexec/qemu-binfmt/aarch64-binfmt-P")
PACKAGES = "qemu-user-static mmdebstrap arch-test"
PIDS, MOUNTS, HOST_NAME = 0x2000_0000, 0x2_0000, 0x400_0000  # clone(2)'s CLONE_NEWPID, CLONE_NEWNS, CLONE_NEWUTS
_USERS = 0x1000_0000  # CLONE_NEWUSER
NO_SETUID, NO_DEVICES, NO_PROGRAMS = 2, 4, 8  # mount(2)'s
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 0x20, 0x1000, 0x4000, 1 << 18
# The flags of a mount that a namespace may not remove: statvfs's value → mount(2)'s value.
_LOCKED = {2: NO_SETUID, 4: NO_DEVICES, 8: NO_PROGRAMS, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_DETACH = 2  # umount2(2)'s MNT_DETACH
_PARENT_DEATH_SIGNAL = 1  # prctl(2)'s PR_SET_PDEATHSIG
_REGISTRY = Path("/proc/sys/fs/binfmt_misc")
# The first 20 bytes of an aarch64 ELF program and a mask of the bits that count; flags: open the interpreter now, so
# that it works in every chroot (F), and keep argv[0] (P, O).
_MAGIC = rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
_ENTRY = b":qemu-aarch64:M::" + _MAGIC + b":" + _MASK + b":" + os.fsencode(INTERPRETER) + b":OCPF"
_IDS = "0 0 65536\n"  # users have the same ids inside and outside

_libc = ctypes.CDLL(None, use_errno=True)


def check_machine(stand_in: str) -> None:
    """Raise an InputError that lists all that this machine lacks for a sandbox."""
    if os.geteuid() != 0:
        raise InputError(f"only root can start {stand_in}", hint="run the command with sudo")
    missing = [] if INTERPRETER.exists() else [str(INTERPRETER)]
    missing += [name for name in ("mmdebstrap", "arch-test") if not shutil.which(name)]
    if missing:
        message = f"{stand_in} needs {' and '.join(missing)}"
        raise InputError(message, hint=f"run `apt-get install {PACKAGES}`")


def enter_room() -> None:
    """Move this process, which must have only one thread, into namespaces in which aarch64 programs run."""
    unshared_read, unshared_write = os.pipe()
    mapped_read, mapped_write = os.pipe()
    helper = os.fork()
    if helper == 0:  # only a process outside may map more than one user
        os.close(unshared_write)
        _map_parent(unshared_read, mapped_write)
    os.close(mapped_write)
    try:
        unshare(_USERS | MOUNTS)
        os.write(unshared_write, b"x")
    finally:
        os.close(unshared_write)  # ends the helper also after a refusal
        mapped = os.read(mapped_read, 1)
        os.waitpid(helper, 0)
    if not mapped:
        raise OSError("the machine refuses to map its users into a namespace")
    for descriptor in (unshared_read, mapped_read):
        os.close(descriptor)
    os.setuid(0)
    os.setgid(0)
    mount("", Path("/"), "", flags=_RECURSIVE | _PRIVATE)
    _register()


def unshare(flags: int) -> None:
    """Put this process into new namespaces; PIDS applies only to its children."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: Path, kind: str, *, flags: int = 0, options: str = "") -> None:
    """Mount a file system."""
    names = [os.fsencode(name) or None for name in (source, target, kind)]
    _check(_libc.mount(*names, ctypes.c_ulong(flags), options.encode() or None), f"mount {kind or source} on {target}")


def bind(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Bind-mount `source`, with all mounts below it, at `target`; `read_only` does not apply to the mounts below."""
    mount(str(source), target, "", flags=_BIND | _RECURSIVE)
    if read_only:
        kept = sum(flag for seen, flag in _LOCKED.items() if os.statvfs(target).f_flag & seen)
        mount("none", target, "", flags=_REMOUNT | _BIND | _READ_ONLY | kept)


def unmount(target: Path) -> None:
    """Detach a mount, with all mounts below it, at once."""
    _check(_libc.umount2(os.fsencode(target), _DETACH), f"unmount {target}")


def die_with_parent() -> None:
    """Let the kernel kill this process as soon as its parent's thread ends."""
    _check(_libc.prctl(_PARENT_DEATH_SIGNAL, 9), "prctl")


def _map_parent(unshared: int, mapped: int) -> None:
    try:
        if not os.read(unshared, 1):
            return
        for name in ("uid_map", "gid_map"):
            Path("/proc", str(os.getppid()), name).write_text(_IDS, encoding="ascii")
        os.write(mapped, b"x")
    finally:
        os._exit(0)


def _register() -> None:
    """Register qemu in this namespace's own binfmt_misc; if the kernel offers none, the machine's must have it."""
    try:
        mount("binfmt_misc", _REGISTRY, "binfmt_misc")
        (_REGISTRY / "register").write_bytes(_ENTRY)
    except OSError as failure:
        if not (_REGISTRY / "qemu-aarch64").exists():
            message = f"{failure}; Linux {os.uname().release} may be older than 6.7, and no qemu-aarch64 is registered"
            raise OSError(message) from None


def _check(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
