"""A phone over adb: found by its serial, its build pinned in the inventory, files home by adb's own copying."""

import os
import posixpath
import re
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rankship_pipeline.errors import CommandFailed, InputError, TargetError, TargetTimeout
from rankship_targets.adb_client import AdbClient, explain, is_explained, list_attached, open_client, show_end
from rankship_targets.adb_command import HOME, AdbCommand
from rankship_targets.adb_state import READY, await_ready, check_build, explain_state, find_state
from rankship_targets.device import Device
from rankship_targets.receiving import SLOWEST_LINK_BYTES_PER_S
from rankship_targets.transport import (
    STEP_TIMEOUT_S,
    Completed,
    explain_failure,
    open_source,
    read_free_bytes,
    run_checked,
    split_lines,
)

__all__ = ["AdbTransport", "list_attached", "open_adb", "read_properties"]


def open_adb(device: Device) -> "AdbTransport":
    """Connect to a device; Unreachable, Unauthorised, ConnectionLost, AmbiguousDevice and others say why not."""
    if not device.serial:
        raise InputError(f"{device.name}: an adb device needs its serial", hint="copy it from `adb devices`")
    client = open_client(device)
    await_ready(client, device)
    transport = AdbTransport(client, device)
    check_build(transport, device)
    return transport


class AdbTransport:
    """Calls of adb, each with a limit of its own; relative paths start at /data/local/tmp."""

    def __init__(self, client: AdbClient, device: Device) -> None:
        self._client = client
        self._device = device

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command to its end."""
        with self._limiting(argv[0], timeout_s), AdbCommand(self._client, argv, timeout_s) as command:
            stdout = b"".join(command.chunks())
            done = command.done()
            return Completed(code=done.code, stdout=stdout.decode(errors="replace"), stderr=done.stderr)

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        """Give stdout line by line while the command runs."""
        with self._limiting(argv[0], timeout_s), AdbCommand(self._client, argv, timeout_s) as command:
            yield from split_lines(command.chunks())
            done = command.done()
        if done.code != 0:
            raise explain_failure(argv, done.code, done.stderr)

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        told: Callable[[int], None] | None = None,
    ) -> Completed:
        """Run a command that takes a file, or what follows `offset` in it."""
        with open_source(local) as source, self._limiting(f"sending {local.name}", timeout_s):
            os.lseek(source.fileno(), offset, os.SEEK_SET)
            with AdbCommand(self._client, argv, timeout_s, source, told) as command:
                stdout = b"".join(command.chunks())
                done = command.done()
                return Completed(code=done.code, stdout=stdout.decode(errors="replace"), stderr=done.stderr)

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file with `adb pull`, under another name until it is whole."""
        path = posixpath.join(HOME, remote)
        size_bytes = read_size(run_checked(self, ["stat", "-L", "-c", "%s %F", "--", path]), remote)
        target = local.resolve()
        part = target.with_name(f".{secrets.token_hex(4)}.part")
        try:
            self._pull(path, str(part), size_bytes, f"fetching {remote}")
            part.replace(target)
        except OSError as failure:
            message = f"fetching {remote} to {local}: {failure.strerror}"
            raise CommandFailed(message, hint="check that the local folder may be written") from None
        finally:
            part.unlink(missing_ok=True)

    def free_bytes(self, folder: str) -> int:
        """Bytes that the shell user may still write below `folder`."""
        return read_free_bytes(self, folder)

    def close(self) -> None:
        """There is nothing to end: each call was a connection of its own, and the server's is shared."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pull(self, source: str, target: str, size_bytes: int, what: str) -> None:
        done = self._client.call(
            "pull", source, target, timeout_s=STEP_TIMEOUT_S + size_bytes / SLOWEST_LINK_BYTES_PER_S
        )
        if done.code != 0:
            raise self._explain_copy(done, what)

    def _explain_copy(self, done: Completed, what: str) -> TargetError:
        """Tell a broken connection from a device that refused: adb's words do not always say."""
        if is_explained(done):
            return explain(done, what)
        state = find_state(self._client, self._device)
        if state != READY:
            return explain_state(self._device, state, f"{what}: {show_end(done)}")
        return CommandFailed(
            f"{what}: {show_end(done)}", hint="check that both paths exist and may be read and written"
        )

    @contextmanager
    def _limiting(self, what: str, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            message = f"{self._device.name} ({self._device.serial}): {what} did not end within {timeout_s:g} s"
            raise TargetTimeout(message, hint="see whether the device is overloaded or the link hangs") from None


def read_size(said: str, remote: str) -> int:
    """Read a regular file's bytes as `stat` prints "12 regular file"; CommandFailed for anything else."""
    found = re.fullmatch(r"([0-9]{1,18}) ([^\n]+)\s*", said)
    if not found:
        message = f"fetching {remote}: the device's stat said {said[:200]!r}"
        raise CommandFailed(message, hint="expected a size and a kind of file: what is `stat` there?")
    if not found[2].startswith("regular"):
        raise CommandFailed(f"fetching {remote}: it is a {found[2].strip()}", hint="only files are fetched")
    return int(found[1])


def read_properties(transport: AdbTransport) -> dict[str, str]:
    """Read the device's system properties (ro.product.model, ro.build.fingerprint, …)."""
    text = run_checked(transport, ["getprop"])
    pairs = [re.fullmatch(r"\[(.*?)\]: \[(.*)\]", line.strip()) for line in text.splitlines()]
    return {pair[1]: pair[2] for pair in pairs if pair}
