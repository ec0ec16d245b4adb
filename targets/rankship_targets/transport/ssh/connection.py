"""A device over SSH: its host key is pinned in the inventory; commands run over channels, files through commands."""

import logging
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

import paramiko

from rankship_pipeline.foundation.errors import (
    AuthError,
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
from rankship_targets.transport.ssh.key import PinnedKey, name_host, read_private_key, refuse_key
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
        self._client = paramiko.SSHClient()  # it knows only this host: no known_hosts file is read
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
        with suppress(paramiko.SSHException, EOFError, OSError):  # if the jump host is already gone
            self._client.close()
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
        host = device.host or ""
        pinned = PinnedKey(self._where, device.host_key or "")
        self._client.get_host_keys().add(name_host(host, device.port), pinned.key.get_name(), pinned.key)
        self._client.set_missing_host_key_policy(pinned)
        key = read_private_key(self._where, Path(device.key_file)) if device.key_file else None
        with self._connecting():
            self._jump, way = open_way(device)
            self._client.connect(
                host,
                port=device.port,
                username=device.user,
                pkey=key,
                allow_agent=key is None,
                look_for_keys=key is None,
                timeout=CONNECT_TIMEOUT_S,
                banner_timeout=CONNECT_TIMEOUT_S,
                auth_timeout=CONNECT_TIMEOUT_S,
                sock=way,
                transport_factory=_make_link,
            )
            self._link().set_keepalive(KEEPALIVE_S)
            if self._jump is not None:
                watch(self._link(), KEEPALIVE_S, Event())

    def _link(self) -> paramiko.Transport:
        link = self._client.get_transport()
        if link is None or not link.is_active():
            raise ConnectionLost(f"{self._where}: the connection is gone", hint="check whether the device is up")
        return link

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
        except paramiko.BadHostKeyException as failure:
            raise refuse_key(self._where, failure.expected_key, failure.key) from None
        except paramiko.AuthenticationException as failure:
            if "timeout" in str(failure).lower():
                message = f"{self._where}: the login did not end within {CONNECT_TIMEOUT_S:g} s"
                raise TargetTimeout(message, hint="check whether the device is overloaded") from None
            hint = "check user and key_file; the public key must be in ~/.ssh/authorized_keys on the device"
            raise AuthError(f"{self._where} refused the login: {failure}", hint=hint) from None
        except TimeoutError:
            message = f"{self._where}: {what} did not end within {timeout_s:g} s"
            raise TargetTimeout(message, hint="check whether the device is overloaded or the network slow") from None
        except (paramiko.SSHException, EOFError, ConnectionError) as failure:
            if "No authentication methods" in str(failure):
                message = f"{self._where}: no key to log in with: none in the SSH agent, none in the usual files"
                raise AuthError(message, hint="run `ssh-add KEY`, or name key_file in the inventory") from None
            raise self._lost(what, failure) from None
        except OSError as failure:
            link = self._client.get_transport()
            if link is None or not link.is_active():
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


def _make_link(
    connection: str | tuple[str, int] | socket.socket | paramiko.Channel | paramiko.ProxyCommand,
    /,
    *,
    disabled_algorithms: Mapping[str, Iterable[str]] | None = None,
    **_: bool,
) -> paramiko.Transport:
    """Make a connection that prefers AEAD ciphers (GCM): a separate MAC costs paramiko a quarter of its time."""
    link = paramiko.Transport(connection, disabled_algorithms=disabled_algorithms)
    options = link.get_security_options()
    options.ciphers = sorted(options.ciphers, key=lambda name: "gcm" not in name)
    return link
