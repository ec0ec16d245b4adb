"""One command over adb: separate stdout and stderr, a reliable exit status, and a way to kill it from outside."""

import os
import re
import secrets
import select
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self

from rankship_pipeline.foundation.errors import ConnectionLost, TargetError, TargetTimeout
from rankship_targets.transport.adb.client import AdbClient, explain
from rankship_targets.transport.protocol import SIGNALLED, Completed

HOME = "/data/local/tmp"
_CHUNK = 1 << 16
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.2
STALLED_S = 60.0
QUIET_S, ANSWER_S = 15.0, 30.0  # after so long without output the phone is checked, and has so long to answer
# The shell first prints its pid, which is also its process group: adbd starts each shell in a session of its own.
# It stays as the parent and prints the exit status last: adb itself exits with 0 when the connection breaks.
_WRAPPER = 'cd {home} || exit; set -- {words}; echo $$; "$@"; set -- $?; echo "{mark} $1" >&2; exit $1'


class AdbCommand:
    """A running command, whose stdin is empty or a file; leaving the block before its end kills its process group.

    Raises TimeoutError when `timeout_s` passes, and a TargetError when adb reports a broken connection.
    """

    def __init__(
        self,
        client: AdbClient,
        argv: Sequence[str],
        timeout_s: float,
        source: BinaryIO | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._client = client
        self._name = argv[0]
        self._deadline = time.monotonic() + timeout_s
        self._mark = f"rankship-{secrets.token_hex(8)}"
        self._group: int | None = None
        self._done: Completed | None = None
        script = _WRAPPER.format(home=HOME, words=shlex.join(argv), mark=self._mark)
        self._stderr = TemporaryFile()  # noqa: SIM115 - closed on leaving
        self._source, self._on_progress = source, on_progress
        self._position, self._moved = -1, time.monotonic()
        self._heard = self._moved
        self._process = subprocess.Popen(
            client.argv("shell", *([] if source else ["-n"]), "-T", script),
            stdin=source or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()
        if self._done is None and self._group is not None:
            kill = f"kill -KILL -- -{self._group}; kill -KILL {self._group}"
            with suppress(TargetError):
                self._client.call("shell", "-n", "-T", kill, timeout_s=_KILL_TIMEOUT_S)

    def chunks(self) -> Iterator[bytes]:
        """Yield stdout as it comes, until the command has ended."""
        head = b""
        while b"\n" not in head:
            chunk = self._receive()
            if not chunk:
                break
            head += chunk
        line, found, rest = head.partition(b"\n")
        if found and (group := read_group(line)):
            self._group = group
            yield rest
            while chunk := self._receive():
                yield chunk
        else:
            rest = head
        try:
            code = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        self._done = self._read_status(code, "" if self._group else rest.decode(errors="replace"))

    def put_off(self, timeout_s: float) -> None:
        """Move the deadline to `timeout_s` from now."""
        self._deadline = time.monotonic() + timeout_s

    def done(self) -> Completed:
        """Return the exit status and stderr, once `chunks` is exhausted; `stdout` is empty."""
        if self._done is None:
            raise AssertionError
        return self._done

    def _receive(self) -> bytes:
        if self._process.stdout is None:  # it was opened as a pipe
            return b""
        descriptor = self._process.stdout.fileno()
        while True:
            left_s = max(0.0, self._deadline - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], min(left_s, _POLL_S))
            self._watch()
            if ready:
                self._heard = time.monotonic()
                return os.read(descriptor, _CHUNK)
            if left_s == 0:
                raise TimeoutError
            if time.monotonic() - self._heard > QUIET_S:
                self._check_answer()

    def _watch(self) -> None:
        """Report how much of the file adb has read; TimeoutError if it makes no progress for too long."""
        if self._source is None:
            return
        now, position = time.monotonic(), os.lseek(self._source.fileno(), 0, os.SEEK_CUR)  # shared with adb
        if position != self._position:
            self._position, self._moved, self._heard = position, now, now
            if self._on_progress:
                self._on_progress(position)
        elif position < os.fstat(self._source.fileno()).st_size and now - self._moved > STALLED_S:
            raise TimeoutError

    def _check_answer(self) -> None:
        """Check that the phone still answers: adb waits forever for a daemon that hangs on an open connection."""
        try:
            done = self._client.call("shell", "-n", "-T", ":", timeout_s=ANSWER_S)
        except TargetTimeout:
            message = f"running {self._name}: the phone fell silent and did not answer for {ANSWER_S:g} s"
            raise ConnectionLost(message, hint="check whether the phone hangs; replug it, or restart it") from None
        if done.code != 0:
            raise explain(done, f"running {self._name}")
        self._heard = time.monotonic()

    def _read_status(self, code: int, stdout: str) -> Completed:
        """Return how the command ended; a TargetError if the connection ended instead."""
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace")
        said, mark, status = stderr.rpartition(f"{self._mark} ")
        number, _, late = status.partition("\n")
        if mark and re.fullmatch("[0-9]{1,3}", number.strip()):
            return Completed(code=int(number), stdout="", stderr=said + late)
        if self._group and code > SIGNALLED:  # the shell itself was killed, as adbd reports it
            return Completed(code=code, stdout="", stderr=stderr)
        raise explain(Completed(code=code, stdout=stdout, stderr=stderr), f"running {self._name}")


def read_group(line: bytes) -> int | None:
    """Parse a shell's pid from its first line; None if it is not a pid: `kill` takes 0 for its own group."""
    found = re.fullmatch(rb"([1-9][0-9]{0,9})\s*", line)
    return int(found[1]) if found else None
