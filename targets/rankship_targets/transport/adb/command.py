"""One command over adb: both outputs apart, its exit status beyond doubt, and a way to end it from outside."""

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
_LOOK_S = 0.2
STALLED_S = 60.0
QUIET_S, ANSWER_S = 15.0, 30.0  # after so long without a word a phone is asked for one, and has so long to answer
# The shell first says its number, which is also its process group's: adbd starts each shell in a session of its own.
# It stays as parent and at last says the exit status: adb itself ends with 0 where the connection broke.
_WRAPPER = 'cd {home} || exit; set -- {words}; echo $$; "$@"; set -- $?; echo "{mark} $1" >&2; exit $1'


class AdbCommand:
    """A running command, whose stdin is empty or a file; whoever leaves before its end takes its process group down.

    Raises TimeoutError when `timeout_s` passes; what adb says of a broken connection comes as its TargetError.
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
        self._place, self._moved = -1, time.monotonic()
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
        """Stdout as it comes, until the command has ended."""
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
        self._done = self._judge(code, "" if self._group else rest.decode(errors="replace"))

    def put_off(self, timeout_s: float) -> None:
        """Count the limit from now on."""
        self._deadline = time.monotonic() + timeout_s

    def done(self) -> Completed:
        """Give the exit status and stderr, once `chunks` is exhausted; `stdout` is empty."""
        if self._done is None:
            raise AssertionError
        return self._done

    def _receive(self) -> bytes:
        if self._process.stdout is None:  # it was opened as a pipe
            return b""
        descriptor = self._process.stdout.fileno()
        while True:
            left_s = max(0.0, self._deadline - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], min(left_s, _LOOK_S))
            self._watch()
            if ready:
                self._heard = time.monotonic()
                return os.read(descriptor, _CHUNK)
            if left_s == 0:
                raise TimeoutError
            if time.monotonic() - self._heard > QUIET_S:
                self._ask()

    def _watch(self) -> None:
        """Tell how far the file is that adb reads; TimeoutError where it stands still for too long."""
        if self._source is None:
            return
        now, place = time.monotonic(), os.lseek(self._source.fileno(), 0, os.SEEK_CUR)  # adb's place is ours
        if place != self._place:
            self._place, self._moved, self._heard = place, now, now
            if self._on_progress:
                self._on_progress(place)
        elif place < os.fstat(self._source.fileno()).st_size and now - self._moved > STALLED_S:
            raise TimeoutError

    def _ask(self) -> None:
        """See that the phone is there yet: adb waits for ever for a daemon that hangs behind a link that stands."""
        try:
            done = self._client.call("shell", "-n", "-T", ":", timeout_s=ANSWER_S)
        except TargetTimeout:
            message = f"running {self._name}: the phone fell silent and did not answer for {ANSWER_S:g} s"
            raise ConnectionLost(message, hint="see whether the phone hangs; replug it, or restart it") from None
        if done.code != 0:
            raise explain(done, f"running {self._name}")
        self._heard = time.monotonic()

    def _judge(self, code: int, stdout: str) -> Completed:
        """Tell the command's end from that of the connection."""
        self._stderr.seek(0)
        stderr = self._stderr.read().decode(errors="replace")
        said, mark, status = stderr.rpartition(f"{self._mark} ")
        number, _, late = status.partition("\n")
        if mark and re.fullmatch("[0-9]{1,3}", number.strip()):
            return Completed(code=int(number), stdout="", stderr=said + late)
        if self._group and code > SIGNALLED:  # the shell itself was killed, and adbd reports it so
            return Completed(code=code, stdout="", stderr=stderr)
        raise explain(Completed(code=code, stdout=stdout, stderr=stderr), f"running {self._name}")


def read_group(line: bytes) -> int | None:
    """Read a shell's number from the first line that it says; None where that is none: 0 would be our own group."""
    found = re.fullmatch(rb"([1-9][0-9]{0,9})\s*", line)
    return int(found[1]) if found else None
