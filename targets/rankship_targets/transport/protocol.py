"""What every transport can do (`Transport`), and the steps that are the same over each of them."""

import re
import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self, TypeVar

from rankship_pipeline.foundation.errors import (
    CommandFailed,
    InputError,
    Lacks,
    NoSpace,
    PersistentTargetError,
    ReadOnly,
)
from rankship_pipeline.foundation.frozen import record

STEP_TIMEOUT_S = 60.0
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # a shell's exit statuses for programs that cannot be started
SIGNALLED = 128  # above it: exit statuses of programs that a signal ended
_TAIL_CHARACTERS = 2000
_BATCH_BYTES = 16_000  # of one command line: a shell takes 128 KiB as one argument, an old adb far less
_SHOWN_CHARACTERS = 200
_FULL = ("No space left on device", "Disk quota exceeded")
_READ_ONLY = "Read-only file system"

T = TypeVar("T")


@record
class Completed:
    """A command that ended; `code` is as in a shell: 126 and 127 could not start, 128+n was ended by signal n."""

    code: int
    stdout: str
    stderr: str


class Transport(Protocol):
    """A connection to one device. A command's stdin is empty except in `feed`; relative paths start at its home.

    Every failure of the connection is a TargetError; a command's own failure is its code (`run`) or CommandFailed
    (`stream`). After TargetTimeout, no process of the command's process group is left running.
    """

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command to its end."""
        ...

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        """Yield stdout line by line while the command runs; closing the generator early ends the command."""
        ...

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        """Run a command with a file as its stdin, from `offset` on; the command may end before it has read all.

        `on_progress` gets the number of the file's bytes, from its beginning, that are on their way. TargetTimeout also
        if there is no progress for STEP_TIMEOUT_S.
        """
        ...

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file from the device; after a failure no partial `local` stays."""
        ...

    def free_bytes(self, folder: str) -> int:
        """Return the bytes that the user can still write below an existing folder."""
        ...

    def close(self) -> None:
        """Close the connection; closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def hash_remote(transport: Transport, remote: str, *, timeout_s: float = STEP_TIMEOUT_S) -> str | None:
    """Return the SHA-256 (hex) of a file on the device; None if there is no readable file."""
    return hash_many(transport, [remote], timeout_s=timeout_s).get(remote)


def hash_many(transport: Transport, remotes: Sequence[str], *, timeout_s: float = STEP_TIMEOUT_S) -> dict[str, str]:
    """Return the SHA-256 (hex) of every readable file among these, with as few commands as possible."""
    # Tools differ in how they print a name with these characters: it gets a command of its own, where it is known.
    odd = [remote for remote in remotes if set(remote) & set("\\\n\r")]
    hashes = {remote: found for remote in odd for found in _hash_batch(transport, [remote], timeout_s).values()}
    for batch in make_batches([remote for remote in remotes if remote not in odd]):
        hashes |= _hash_batch(transport, batch, timeout_s)
    return hashes


def _hash_batch(transport: Transport, remotes: Sequence[str], timeout_s: float) -> dict[str, str]:
    argv = ["sha256sum", "--", *remotes]
    done = transport.run(argv, timeout_s=timeout_s)
    if done.code in {NOT_EXECUTABLE, NOT_FOUND}:
        raise Lacks("the device lacks `sha256sum`", hint="install coreutils (or busybox, toybox) on the device")
    if done.code not in {0, 1}:  # 1: some of them are not readable files
        raise explain_failure(argv, done.code, done.stderr)
    hashes = read_hashes(done.stdout, remotes)
    if hashes is None or (done.code == 0 and len(hashes) < len(set(remotes))):
        message = f"sha256sum on the device printed {done.stdout[-_SHOWN_CHARACTERS:]!r}"
        raise CommandFailed(message, hint="expected one hash and name per line: check the device's `sha256sum`")
    return hashes


def read_hashes(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """Parse what sha256sum printed for these names; None for any other text."""
    if len(names) == 1:  # the name is known, however it is printed; a backslash means that it is escaped
        match = re.match(r"\\?([0-9a-f]{64}) [ *]", text)
        return {names[0]: match[1]} if match else None if text else {}
    hashes: dict[str, str] = {}
    for line in text.removesuffix("\n").split("\n") if text else []:
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.*)", line)
        if not match or match[2] not in names:
            return None
        hashes[match[2]] = match[1]
    return hashes


def make_batches(items: Iterable[T], show: Callable[[T], str] = str) -> Iterator[list[T]]:
    """Group the arguments of a command, so that each command line is short enough for every shell."""
    batch: list[T] = []
    length = 0
    for item in items:
        size = len(shlex.quote(show(item)).encode()) + 1
        if batch and length + size > _BATCH_BYTES:
            yield batch
            batch, length = [], 0
        batch.append(item)
        length += size
    if batch:
        yield batch


def open_source(local: Path) -> BinaryIO:
    """Open a file to copy; the caller closes it."""
    try:
        return local.open("rb")
    except OSError as failure:
        raise InputError(f"cannot read {local}: {failure.strerror}", hint="name a file that exists") from None


def run_checked(transport: Transport, argv: Sequence[str], *, timeout_s: float = STEP_TIMEOUT_S) -> str:
    """Run a command that must succeed and return its stdout."""
    done = transport.run(argv, timeout_s=timeout_s)
    if done.code != 0:
        raise explain_failure(argv, done.code, done.stderr)
    return done.stdout


def read_numbers(text: str, count: int, what: str) -> tuple[int, ...]:
    """Parse `count` whole numbers that a device's command printed; CommandFailed for any other text."""
    words = text.split()
    if len(words) != count or not all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in words):
        message = f"{what}: the device printed {text[:_SHOWN_CHARACTERS]!r}, expected {count} whole number(s)"
        raise CommandFailed(message, hint="`rankship doctor` checks the device's tools")
    return tuple(map(int, words))


def read_free_bytes(transport: Transport, folder: str) -> int:
    """Return the bytes that the user can still write below `folder`, by the device's `stat`."""
    text = run_checked(transport, ["stat", "-f", "-c", "%a %S", "--", folder])
    blocks, block_bytes = read_numbers(text, 2, f"free space of {folder}")
    return blocks * block_bytes


def explain_failure(argv: Sequence[str], code: int, stderr: str) -> PersistentTargetError:
    """Return the error for a command that ended with `code`, with the end of its stderr."""
    said = stderr.strip()[-_TAIL_CHARACTERS:] or "(nothing on stderr)"
    cause = f"was ended by signal {code - 128}" if code > 128 else f"ended with status {code}"  # noqa: PLR2004 - shell's
    return name_refusal(
        f"{argv[0]} {cause}: {said}", hint="the device's own message is above; `rankship doctor` checks the device"
    )


def name_refusal(message: str, *, hint: str) -> PersistentTargetError:
    """Return the error for a device's message: NoSpace, ReadOnly, or CommandFailed with this hint."""
    if any(words in message for words in _FULL):
        return NoSpace(message, hint="free space on the device or choose another workdir in the inventory")
    if _READ_ONLY in message:
        return ReadOnly(message, hint="`dmesg` on the device says why: often a worn SD card; remount it or replace it")
    return CommandFailed(message, hint=hint)


def split_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield lines of text without their newline, as soon as each is complete; bytes that are not UTF-8 are replaced."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
