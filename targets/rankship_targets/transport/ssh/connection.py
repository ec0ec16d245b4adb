"""A device over SSH: its host key is pinned in the inventory; commands run over channels, files through commands."""

import logging
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

import paramiko

from rankship_pipeline.foundation.errors import (
    CommandFailed,
    ConnectionLost,
    TargetTimeout,
    Unreachable,
)
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import (
    SIGNALLED,
    STEP_TIMEOUT_S,
    Completed,
    explain_failure,
    open_source,
    read_free_bytes,
    split_lines,
)
from rankship_targets.transport.ssh.command import SshCommand, end_link
from rankship_targets.transport.ssh.key import PinnedKey
from rankship_targets.transport.ssh.login import log_in
from rankship_targets.transport.ssh.route import CONNECT_TIMEOUT_S, describe_address, dial, dig, watch, watching

KEEPALIVE_S = 15

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # the user sees its errors as this module's


def open_ssh(device: Device) -> "SshTransport":
    """Connect to a device; raises AuthError, HostKeyChanged or Unreachable."""
    return SshTransport(device)


class SshTransport:
    """One authenticated connection; relative paths start at the home directory."""

    def __init__(self, device: Device) -> None:
        self._where = describe_address(device)
        self._jump: SshTransport | None = None
        self._open: paramiko.Transport | None = None
        try:
            self._connect(device)
        except BaseException:
            self.close()
            raise

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command to its end."""
        with self._explaining(argv[0], timeout_s), SshCommand(self._link(), argv, timeout_s) as command:
            stdout = b"".join(command.chunks())
            return Completed(code=command.code(), stdout=stdout.decode(errors="replace"), stderr=command.stderr())

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        """Yield stdout line by line while the command runs."""
        link = self._link()
        with (
            self._explaining(argv[0], timeout_s),
            SshCommand(link, argv, timeout_s) as command,
            watching(link, KEEPALIVE_S),  # the kernel still answers for a server that was stopped
        ):
            yield from split_lines(command.chunks())
            check_end(argv[0], command)

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
        link = self._link()
        with open_source(local) as source, self._explaining(f"sending {local.name}", timeout_s):
            source.seek(offset)
            with _cutting(link), SshCommand(link, argv, timeout_s, fed=True) as command:
                command.feed(source, STEP_TIMEOUT_S, on_progress)
                stdout = b"".join(command.chunks())
                return Completed(code=command.code(), stdout=stdout.decode(errors="replace"), stderr=command.stderr())

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file from the device through `cat`: paramiko's SFTP reads in a thread that prints tracebacks."""
        argv = ["cat", "--", remote]
        try:
            with (
                self._explaining(f"fetching {remote}", STEP_TIMEOUT_S),
                SshCommand(self._link(), argv, STEP_TIMEOUT_S) as command,
                local.open("wb") as target,
            ):
                for chunk in command.chunks():
                    target.write(chunk)
                    command.put_off(STEP_TIMEOUT_S)
                if command.code() > SIGNALLED:
                    raise EOFError("`cat` on the device was killed")  # noqa: TRY301 - as a broken connection shows
                check_end(f"fetching {remote}", command)
        except BaseException:
            local.unlink(missing_ok=True)
            raise

    def free_bytes(self, folder: str) -> int:
        """Return the bytes that the login user can still write below `folder`."""
        return read_free_bytes(self, folder)

    def close(self) -> None:
        """Close the connection, and the one to the jump host."""
        if self._open is not None:
            end_link(self._open)
        if self._jump is not None:
            self._jump.close()

    def open_tunnel(self, host: str, port: int) -> paramiko.Channel:
        """Open a channel from this device to another host's port."""
        return dig(self._where, self._link(), host, port, CONNECT_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, device: Device) -> None:
        pinned = PinnedKey(self._where, device.host_key or "")
        with self._connecting():
            self._open = log_in(device, lambda: self._greet(device, pinned))
            self._open.set_keepalive(KEEPALIVE_S)
            if self._jump is not None:
                watch(self._open, KEEPALIVE_S, Event())

    def _greet(self, device: Device, pinned: PinnedKey) -> paramiko.Transport:
        """Open a connection, in the place of an earlier one, up to the check of the host key."""
        self.close()
        self._jump, way = open_way(device)
        self._open = _make_link(way)
        pinned.prefer(self._open)
        self._open.start_client(timeout=CONNECT_TIMEOUT_S)
        pinned.check(self._open.get_remote_server_key())
        return self._open

    def _link(self) -> paramiko.Transport:
        if self._open is None or not self._open.is_active():
            raise ConnectionLost(f"{self._where}: the connection is gone", hint="check whether the device is up")
        return self._open

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        """Turn every connection error and timeout during connecting into Unreachable."""
        try:
            with self._explaining("connecting", CONNECT_TIMEOUT_S):
                yield
        except Unreachable:
            raise
        except (ConnectionLost, TargetTimeout) as failure:
            raise Unreachable(str(failure), hint=failure.hint) from None

    @contextmanager
    def _explaining(self, what: str, timeout_s: float) -> Iterator[None]:
        """Turn errors of paramiko and the system into TargetErrors."""
        try:
            yield
        except TimeoutError:
            message = f"{self._where}: {what} did not end within {timeout_s:g} s"
            raise TargetTimeout(message, hint="check whether the device is overloaded or the network slow") from None
        except (paramiko.SSHException, EOFError, ConnectionError) as failure:
            raise self._lost(what, failure) from None
        except OSError as failure:
            if self._open is None or not self._open.is_active():
                raise self._lost(what, failure) from None
            message = f"{self._where}: {what}: {failure.strerror or failure}"
            raise CommandFailed(message, hint="check that the path exists and is writable") from None

    def _lost(self, what: str, failure: BaseException) -> ConnectionLost:
        message = f"{self._where}: connection lost while {what}: {str(failure) or type(failure).__name__}"
        return ConnectionLost(message, hint="check whether the device is up and sshd listens on that port")


@contextmanager
def _cutting(link: paramiko.Transport) -> Iterator[None]:
    """Close a connection whose answer did not come in time: bytes on their way would still arrive later."""
    try:
        yield
    except TimeoutError:
        end_link(link)
        raise


def check_end(what: str, command: SshCommand) -> None:
    """Raise the error for a command that failed, with its stderr."""
    if command.code() != 0:
        raise explain_failure([what], command.code(), command.stderr())


def open_way(device: Device) -> tuple[SshTransport | None, socket.socket | paramiko.Channel]:
    """Open the stream to the device's SSH port, and the connection to the jump host that carries it, if there is one.

    The caller closes both.
    """
    host, where = device.host or "", describe_address(device)
    if device.via is None:
        return None, dial(where, host, device.port, CONNECT_TIMEOUT_S)
    jump = SshTransport(device.via)
    try:
        return jump, jump.open_tunnel(host, device.port)
    except BaseException:
        jump.close()
        raise


def _make_link(way: socket.socket | paramiko.Channel) -> paramiko.Transport:
    """Make a connection that prefers AEAD ciphers (GCM): a separate MAC costs paramiko a quarter of its time."""
    link = paramiko.Transport(way)
    link.banner_timeout = CONNECT_TIMEOUT_S
    options = link.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    return link
