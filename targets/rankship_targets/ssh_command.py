"""One command over one SSH channel: both outputs drained at once, and a way to end it from outside."""

import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Thread, Timer
from types import TracebackType
from typing import Self

import paramiko

from rankship_pipeline.errors import CommandFailed

_CHUNK = 1 << 16
_KILL_TIMEOUT_S = 5.0
_LONGEST_HEAD_BYTES = 4096
# The shell first says its process group, so that another channel can end everything that the command started:
# closing a channel ends nothing. It stays as parent, so that a signal's death comes back as 128+n. Messages are asked
# for in English, because some are understood ("Read-only file system"); nothing else of the locale changes.
# qemu's user emulation tells a program that its own group is 0, but not what another program reads.
_ASK_ANOTHER = '[ "$group" != 0 ] || group=$(cut -d " " -f 5 /proc/$$/stat)'
_WRAPPER = (
    f'export LC_MESSAGES=C; read -r a b c d group e < /proc/$$/stat; {_ASK_ANOTHER}; echo "$group"; "$@"; exit $?'
)


def end_link(link: paramiko.Transport) -> None:
    """Close a connection, also one through a jump host that is gone already."""
    with suppress(paramiko.SSHException, EOFError, OSError):
        link.close()


def start_channel(
    link: paramiko.Transport, request: Callable[[paramiko.Channel], None], timeout_s: float
) -> paramiko.Channel:
    """Open a channel and make its one request; the library would wait for the answer for ever, so the link is cut."""
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
    """A running command with empty stdin; whoever leaves before its end takes its process group down.

    Raises TimeoutError when `timeout_s` passes, EOFError when the connection breaks.
    """

    def __init__(self, link: paramiko.Transport, argv: Sequence[str], timeout_s: float) -> None:
        self._link = link
        self._deadline = time.monotonic() + timeout_s
        self._group: int | None = None
        self._ended = False
        self._errors = bytearray()
        words = ["sh", "-c", _WRAPPER, "sh", *argv]
        self._channel = start_channel(link, lambda channel: channel.exec_command(shlex.join(words)), timeout_s)
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
        """Stdout as it comes, until the command has ended."""
        yield self._read_group()
        while chunk := self._receive():
            yield chunk
        self._drain.join(self._left_s())
        if not self._channel.status_event.wait(self._left_s()) or self._drain.is_alive():
            raise TimeoutError
        if self._channel.exit_status < 0:  # the shell always has one; without it, the link broke
            raise EOFError
        self._ended = True

    def code(self) -> int:
        """Tell the exit status, once `chunks` is exhausted."""
        return self._channel.exit_status

    def stderr(self) -> str:
        """Give everything said on stderr, once `chunks` is exhausted."""
        return self._errors.decode(errors="replace")

    def _read_group(self) -> bytes:
        """Read the shell's first line; gives the stdout that came after it."""
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
        # The main thread sets the channel's timeout for its own reads; here a timeout means "look again".
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
    """Split what a shell said first into its process group and what the command itself said."""
    line, newline, rest = head.partition(b"\n")
    if not newline or not re.fullmatch(rb"[1-9][0-9]{0,9}", line):
        message = f"the login shell says {line[:80]!r} before any command runs"
        raise CommandFailed(message, hint="keep ~/.bashrc silent for non-interactive shells on the device")
    return int(line), rest
