"""The host as a device: commands run in process groups of their own, files are copied."""

import errno
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Self

from rankship_pipeline.foundation.errors import TargetTimeout
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import (
    NOT_EXECUTABLE,
    NOT_FOUND,
    Completed,
    explain_failure,
    name_refusal,
    open_source,
    split_lines,
)

_CHUNK = 1 << 16


def open_local(device: Device) -> "LocalTransport":  # noqa: ARG001 - every opener takes the device
    """Open the local transport."""
    return LocalTransport()


class LocalTransport:
    """Runs on this host; relative paths start at `home`, by default the user's home directory."""

    def __init__(self, home: Path | None = None) -> None:
        self._home = home or Path.home()

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command to its end."""
        return self._run(argv, timeout_s)

    def _run(self, argv: Sequence[str], timeout_s: float, stdin: IO[bytes] | int = subprocess.DEVNULL) -> Completed:
        with TemporaryFile() as stderr:
            try:
                with self._start(argv, stderr, stdin) as process:
                    stdout = b"".join(_read(process, argv, timeout_s))
            except OSError as failure:
                return Completed(code=_start_code(failure), stdout="", stderr=f"{argv[0]}: {failure.strerror}\n")
            text = _read_all(stderr)
        return Completed(code=_shell_code(process), stdout=stdout.decode(errors="replace"), stderr=text)

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        """Yield stdout line by line while the command runs."""
        with TemporaryFile() as stderr:
            try:
                with self._start(argv, stderr) as process:
                    yield from split_lines(_read(process, argv, timeout_s))
            except OSError as failure:
                raise explain_failure(argv, _start_code(failure), str(failure.strerror)) from None
            if process.returncode != 0:
                raise explain_failure(argv, _shell_code(process), _read_all(stderr))

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        """Run a command with a file as its stdin, from `offset` on."""
        with open_source(local) as source:
            os.lseek(source.fileno(), offset, os.SEEK_SET)
            done = self._run(argv, timeout_s, source)
            if on_progress:
                on_progress(local.stat().st_size)
        return done

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file to `local`."""
        try:
            with _copying(remote, str(local)):
                shutil.copyfile(self._home / remote, local)
        except BaseException:
            local.unlink(missing_ok=True)
            raise

    def free_bytes(self, folder: str) -> int:
        """Return the bytes that this user can still write there."""
        with _copying("free space", folder):
            return shutil.disk_usage(self._home / folder).free

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _start(
        self, argv: Sequence[str], stderr: IO[bytes], stdin: IO[bytes] | int = subprocess.DEVNULL
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a command; an error in the block kills its whole process group."""
        process = subprocess.Popen(
            list(argv),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=self._home,
            start_new_session=True,
        )
        with process:  # waits for it and closes its pipe
            try:
                yield process
            except BaseException:
                _end_group(process)
                raise


def _read(process: subprocess.Popen[bytes], argv: Sequence[str], timeout_s: float) -> Iterator[bytes]:
    """Yield stdout until the command has closed it and ended; TargetTimeout after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    if process.stdout is None:  # it was opened as a pipe
        return
    descriptor = process.stdout.fileno()
    try:
        while True:
            _await_readable(descriptor, deadline)
            chunk = os.read(descriptor, _CHUNK)
            if not chunk:
                break
            yield chunk
        process.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        message = f"{argv[0]} did not end within {timeout_s:g} s"
        raise TargetTimeout(message, hint="it was killed; check whether the machine is overloaded") from None


def _await_readable(descriptor: int, deadline: float) -> None:
    ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        raise TimeoutError


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # the session's leader: its pid is the group


def _shell_code(process: subprocess.Popen[bytes]) -> int:
    code = process.wait()
    return code if code >= 0 else 128 - code


def _start_code(failure: OSError) -> int:
    return NOT_FOUND if failure.errno == errno.ENOENT else NOT_EXECUTABLE


def _read_all(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


@contextmanager
def _copying(source: str, target: str) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        message = f"copying {source} to {target}: {failure.strerror}"
        raise name_refusal(message, hint="check that both paths exist and that you may read and write them") from None
