"""What every way to a device can do, and the one way in which files are copied to it."""

import importlib
import posixpath
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rankship_pipeline.errors import (
    CommandFailed,
    InputError,
    Lacks,
    NoSpace,
    PersistentTargetError,
    ReadOnly,
    TargetError,
)
from rankship_pipeline.records import record
from rankship_pipeline.units import show_bytes
from rankship_targets.device import Device

# transport → module:function that opens it; imported on use, so that a local run never loads an SSH library.
TRANSPORTS = {
    "local": "rankship_targets.local:open_local",
    "ssh": "rankship_targets.ssh:open_ssh",
    "adb": "rankship_targets.adb:open_adb",
}
STEP_TIMEOUT_S = 60.0
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # a shell's exit codes for programs that cannot be started
_TAIL_CHARACTERS = 2000
# What the C library says of EROFS and ENOSPC, on Linux and Android alike.
READ_ONLY_WORDS, NO_SPACE_WORDS = "Read-only file system", "No space left on device"
READ_ONLY_HINT = "choose another workdir, or `mount -o remount,rw` it; a worn SD card turns read-only by itself"


@record
class Completed:
    """A command that ended; `code` follows the shell: 126 and 127 could not start, 128+n ended by signal n."""

    code: int
    stdout: str
    stderr: str


class Transport(Protocol):
    """A connection to one device. Commands see an empty stdin; relative paths start at the login folder.

    Every failure of the way itself is a TargetError; a command's own failure is its code (`run`) or CommandFailed
    (`stream`). After TargetTimeout nothing that the command started in its process group is left running.
    """

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command to its end."""
        ...

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        """Give stdout line by line while the command runs; leaving early ends the command."""
        ...

    def send(self, local: Path, remote: str) -> None:
        """Copy a file to the device, unverified."""
        ...

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file from the device; on failure no partial `local` stays."""
        ...

    def free_bytes(self, folder: str) -> int:
        """Bytes that we may still write below an existing folder."""
        ...

    def close(self) -> None:
        """End the connection; closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_transport(device: Device) -> Transport:
    """Connect to a device in the way its inventory entry says; an emulated one is started if it does not run yet."""
    if device.twin is not None:
        from rankship_targets.twin import ensure_running

        device = ensure_running(device)
    module, function = TRANSPORTS[device.transport].split(":")
    opener: Callable[[Device], Transport] = getattr(importlib.import_module(module), function)
    return opener(device)


def copy_verified(transport: Transport, local: Path, remote: str, sha256: str) -> bool:
    """Make `remote` hold exactly the content with this hash; False where it already did.

    A reader on the device sees the old file or the whole new one: the copy is checked under another name first.
    """
    if hash_remote(transport, remote) == sha256:
        return False
    size = _size(local)
    folder = posixpath.dirname(remote) or "."
    run_checked(transport, ["mkdir", "-p", "--", folder])
    free = transport.free_bytes(folder)
    if free < size:
        message = f"{folder} has {show_bytes(free)} free, {local.name} needs {show_bytes(size)}"
        raise NoSpace(message, hint="free space on the device or choose another workdir in the inventory")
    part = f"{remote}.{secrets.token_hex(4)}.part"
    try:
        transport.send(local, part)
        _check_arrived(hash_remote(transport, part), sha256, local, remote)
        run_checked(transport, ["mv", "-f", "--", part, remote])
    except BaseException:
        with suppress(TargetError):
            transport.run(["rm", "-f", "--", part], timeout_s=STEP_TIMEOUT_S)
        raise
    return True


def _check_arrived(arrived: str | None, expected: str, local: Path, remote: str) -> None:
    if arrived != expected:
        message = f"{local.name} arrived at {remote} with SHA-256 {arrived}, expected {expected}"
        raise CommandFailed(message, hint="the local file changed or the copy was damaged: copy again")


def hash_remote(transport: Transport, remote: str) -> str | None:
    """Compute the SHA-256 (hex) of a file on the device; None where there is no readable file."""
    done = transport.run(["sha256sum", "--", remote], timeout_s=STEP_TIMEOUT_S)
    if done.code in {NOT_EXECUTABLE, NOT_FOUND}:
        raise Lacks("the device lacks `sha256sum`", hint="install coreutils (or busybox, toybox) on the device")
    # A leading backslash marks a name that sha256sum had to escape; the hash follows.
    return done.stdout.removeprefix("\\").split(" ", 1)[0] if done.code == 0 else None


def run_checked(transport: Transport, argv: Sequence[str], *, timeout_s: float = STEP_TIMEOUT_S) -> str:
    """Run a command that must succeed and give its stdout."""
    done = transport.run(argv, timeout_s=timeout_s)
    if done.code != 0:
        raise explain_failure(argv, done.code, done.stderr)
    return done.stdout


def explain_failure(argv: Sequence[str], code: int, stderr: str) -> PersistentTargetError:
    """Make the error for a command that ended with `code`, with the end of what it said."""
    last = (stderr.strip().splitlines() or [""])[-1]
    if last.endswith(READ_ONLY_WORDS):
        return ReadOnly(last, hint=READ_ONLY_HINT)
    if last.endswith(NO_SPACE_WORDS):
        return NoSpace(last, hint="free space on the device or choose another workdir in the inventory")
    said = stderr.strip()[-_TAIL_CHARACTERS:] or "(nothing on stderr)"
    cause = f"was ended by signal {code - 128}" if code > 128 else f"ended with status {code}"  # noqa: PLR2004 - shell's
    return CommandFailed(
        f"{argv[0]} {cause}: {said}", hint="the device's own words are above; `rankship doctor` checks it"
    )


def split_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines of text, without their newline, as soon as each is whole; what is not UTF-8 is replaced."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _size(local: Path) -> int:
    try:
        return local.stat().st_size
    except OSError as failure:
        raise InputError(f"cannot read {local}: {failure.strerror}", hint="the file to copy must exist") from None
