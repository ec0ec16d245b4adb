"""A phone over adb: found by its serial, its build pinned in the inventory; files are copied through commands."""

import os
import re
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rankship_pipeline.foundation.errors import CommandFailed, ConnectionLost, InputError, TargetTimeout
from rankship_targets.devices.device import Device
from rankship_targets.transport.adb.client import AdbClient, list_attached, open_client
from rankship_targets.transport.adb.command import AdbCommand
from rankship_targets.transport.adb.state import await_ready, check_build
from rankship_targets.transport.protocol import (
    SIGNALLED,
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
    """Connect to a device; raises Unreachable, Unauthorised, ConnectionLost, AmbiguousDevice or another TargetError."""
    if not device.serial:
        raise InputError(f"{device.name}: an adb device needs its serial", hint="copy it from `adb devices`")
    client = open_client(device)
    await_ready(client, device)
    transport = AdbTransport(client, device)
    check_build(transport, device)
    return transport


class AdbTransport:
    """Calls of adb, each with its own time limit; relative paths start at /data/local/tmp."""

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
        """Yield stdout line by line while the command runs."""
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
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        """Run a command with a file as its stdin, from `offset` on."""
        with open_source(local) as source, self._limiting(f"sending {local.name}", timeout_s):
            os.lseek(source.fileno(), offset, os.SEEK_SET)
            with AdbCommand(self._client, argv, timeout_s, source, on_progress) as command:
                stdout = b"".join(command.chunks())
                done = command.done()
                return Completed(code=done.code, stdout=stdout.decode(errors="replace"), stderr=done.stderr)

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file from the device through `cat`, under a temporary name until it is complete."""
        what, target = f"fetching {remote}", local.resolve()
        part = target.with_name(f".{secrets.token_hex(4)}.part")
        try:
            with (
                self._limiting(what, STEP_TIMEOUT_S),
                AdbCommand(self._client, ["cat", "--", remote], STEP_TIMEOUT_S) as command,
                part.open("wb") as stream,
            ):
                for chunk in command.chunks():
                    stream.write(chunk)
                    command.put_off(STEP_TIMEOUT_S)
                done = command.done()
            if done.code > SIGNALLED:
                raise ConnectionLost(f"{what}: `cat` on the device was killed", hint="`dmesg` there may say why")
            if done.code != 0:
                raise explain_failure([what], done.code, done.stderr)
            part.replace(target)
        except OSError as failure:
            message = f"{what} to {local}: {failure.strerror}"
            raise CommandFailed(message, hint="check that the local folder is writable") from None
        finally:
            part.unlink(missing_ok=True)

    def free_bytes(self, folder: str) -> int:
        """Return the bytes that the shell user can still write below `folder`."""
        return read_free_bytes(self, folder)

    def close(self) -> None:
        """Do nothing: each call had its own connection, and the server is shared."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _limiting(self, what: str, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            message = f"{self._device.name} ({self._device.serial}): {what} did not end within {timeout_s:g} s"
            raise TargetTimeout(message, hint="check whether the device is overloaded or its link hangs") from None


def read_properties(transport: AdbTransport) -> dict[str, str]:
    """Read the device's system properties (ro.product.model, ro.build.fingerprint, …)."""
    text = run_checked(transport, ["getprop"])
    pairs = [re.fullmatch(r"\[(.*?)\]: \[(.*)\]", line.strip()) for line in text.splitlines()]
    return {pair[1]: pair[2] for pair in pairs if pair}
