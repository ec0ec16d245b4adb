"""One command over one SSH channel: stdout and stderr are read at the same time, and it can be killed from outside."""

import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Thread, Timer
from types import TracebackType
from typing import BinaryIO, Self

import paramiko

from rankship_pipeline.foundation.errors import CommandFailed

_CHUNK = 1 << 16
_FED_BYTES = 1 << 17
_KILL_TIMEOUT_S = 5.0
_LONGEST_HEAD_BYTES = 4096
# The shell first prints its process group, so that another channel can kill everything that the command started:
# closing a channel kills nothing. It stays as the parent, so that death by signal n comes back as 128+n. Messages are
# in English, because some are parsed ("Read-only file system"); the rest of the locale stays.
# qemu's user emulation shows a program 0 as its own group, but shows a child the right one.
_READ_GROUP = "read -r a b c d group e < /proc/$$/stat"
_WRAPPER = (
    f'export LC_MESSAGES=C; {_READ_GROUP}; [ "$group" != 0 ] || group=$({_READ_GROUP}; echo "$group"); '
    'echo "$group"; "$@"; exit $?'
)


def end_link(link: paramiko.Transport) -> None:
    """Close a connection, also one through a jump host that is already gone."""
    with suppress(paramiko.SSHException, EOFError, OSError):
        link.close()


def start_channel(
    link: paramiko.Transport, request: Callable[[paramiko.Channel], None], timeout_s: float
) -> paramiko.Channel:
    """Open a channel and send its request; closes the connection after `timeout_s`, as paramiko would wait forever."""
    cut = Timer(timeout_s, end_link, (link,))
    cut.daemon = True
    cut.start()
    try:
        channel = link.open_session(timeout=timeout_s)
        request(channel)
    finally:
        cut.cancel()
    return channel


class SshCommand:
    """A running command, whose stdin is empty unless `fed`; leaving the block before its end kills its process group.

    Raises TimeoutError when `timeout_s` passes, EOFError when the connection breaks.
    """

    def __init__(self, link: paramiko.Transport, argv: Sequence[str], timeout_s: float, *, fed: bool = False) -> None:
        self._link = link
        self._deadline = time.monotonic() + timeout_s
        self._group: int | None = None
        self._ended = False
        self._errors = bytearray()
        self._rest = b""
        words = ["sh", "-c", _WRAPPER, "sh", *argv]
        self._channel = start_channel(link, lambda channel: channel.exec_command(shlex.join(words)), timeout_s)
        if not fed:
            self._channel.shutdown_write()
        self._drain = Thread(target=self._read_stderr, daemon=True)
        self._drain.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()
        if not self._ended and self._group and self._link.is_active():
            self._kill(self._group)

    def chunks(self) -> Iterator[bytes]:
        """Yield stdout as it comes, until the command has ended."""
        yield self._read_group() if self._group is None else self._rest
        while chunk := self._receive():
            yield chunk
        self._drain.join(self._left_s())
        if not self._channel.status_event.wait(self._left_s()) or self._drain.is_alive():
            raise TimeoutError
        if self._channel.exit_status < 0:  # the shell always has one; without it, the link broke
            raise EOFError
        self._ended = True

    def feed(self, source: BinaryIO, patience_s: float, on_progress: Callable[[int], None] | None) -> None:
        """Send the rest of `source`, unless the command ends before; TimeoutError without progress in `patience_s`."""
        self._rest = self._read_group()  # so that it can be killed
        while chunk := source.read(_FED_BYTES):
            self._channel.settimeout(min(patience_s, self._left_s()))
            try:
                self._channel.sendall(chunk)
            except TimeoutError:
                raise
            except OSError:  # the channel is closed: the command's status, or the broken connection, explains it later
                return
            if on_progress:
                on_progress(source.tell())
        with suppress(OSError, EOFError):
            self._channel.shutdown_write()

    def put_off(self, timeout_s: float) -> None:
        """Move the deadline to `timeout_s` from now."""
        self._deadline = time.monotonic() + timeout_s

    def code(self) -> int:
        """Return the exit status, once `chunks` is exhausted."""
        return self._channel.exit_status

    def stderr(self) -> str:
        """Return all of stderr, once `chunks` is exhausted."""
        return self._errors.decode(errors="replace")

    def _read_group(self) -> bytes:
        """Read the shell's first line; returns the stdout that came after it."""
        head = b""
        while b"\n" not in head and len(head) < _LONGEST_HEAD_BYTES:
            chunk = self._receive()
            if not chunk:
                if self._link.is_active() and self._channel.eof_received:
                    raise CommandFailed("the login shell ran nothing", hint="the device needs a POSIX `sh`")
                raise EOFError
            head += chunk
        self._group, rest = read_group(head)
        return rest

    def _receive(self) -> bytes:
        self._channel.settimeout(self._left_s())
        return self._channel.recv(_CHUNK)

    def _left_s(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _read_stderr(self) -> None:
        # The main thread sets the channel's timeout for its own reads; here a timeout means to read again.
        while True:
            try:
                chunk = self._channel.recv_stderr(_CHUNK)
            except TimeoutError:
                if self._channel.closed:
                    return
                continue
            if not chunk:
                return
            self._errors += chunk

    def _kill(self, group: int) -> None:
        with suppress(paramiko.SSHException, EOFError, OSError):
            kill = f"kill -s KILL -- -{group}"
            channel = start_channel(self._link, lambda channel: channel.exec_command(kill), _KILL_TIMEOUT_S)
            channel.status_event.wait(_KILL_TIMEOUT_S)
            channel.close()


def read_group(head: bytes) -> tuple[int, bytes]:
    """Split a shell's first output into its process group and the command's own output."""
    line, newline, rest = head.partition(b"\n")
    if not newline or not re.fullmatch(rb"[1-9][0-9]{0,9}", line):
        message = f"the login shell prints {line[:80]!r} before any command runs"
        raise CommandFailed(message, hint="keep ~/.bashrc silent for non-interactive shells on the device")
    return int(line), rest
