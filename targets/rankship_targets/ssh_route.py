"""The byte stream to a board's SSH port: straight, or through another board's connection; nobody is trusted yet."""

import socket
import time

import paramiko

from rankship_pipeline.errors import Unreachable

# A link that swallows packets would hang SFTP for ever; the kernel drops it after this long without an answer.
SILENCE_LIMIT_MS = 30_000
_COPIED_BYTES = 1 << 16  # keepalives and requests never add up to this without an answer between
_REFUSED_BY_POLICY = 1  # RFC 4254's "administratively prohibited"


def dial(where: str, host: str, port: int, timeout_s: float) -> socket.socket:
    """Open a TCP connection that the kernel gives up when the other end falls silent."""
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except socket.gaierror as failure:
        hint = "correct host in the inventory; names that end in .local need mDNS on both machines"
        raise Unreachable(f"{where}: {host!r} is no known name: {failure.strerror}", hint=hint) from None
    except TimeoutError:
        message = f"{where}: nothing answers at {host} within {timeout_s:g} s"
        raise Unreachable(message, hint="see whether the device is on and in this network") from None
    except ConnectionRefusedError:
        message = f"{where}: {host} refused the connection to port {port}"
        raise Unreachable(message, hint="start the device's SSH server, or correct port in the inventory") from None
    except (OSError, UnicodeError) as failure:  # UnicodeError: a host that no name could ever be
        reason = getattr(failure, "strerror", None) or failure
        message = f"{where}: {host} cannot be reached: {reason}"
        raise Unreachable(message, hint="see whether the device is on and in this network") from None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_LIMIT_MS)
    return connection


def dig(where: str, link: paramiko.Transport, host: str, port: int, timeout_s: float) -> "Tunnel":
    """Open a channel to another host's port through the connection to a jump host."""
    try:
        channel = link.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
    except paramiko.ChannelException as failure:
        forbidden = failure.code == _REFUSED_BY_POLICY
        hint = (
            "its sshd_config forbids it: AllowTcpForwarding must allow at least `local`"
            if forbidden
            else "see whether the device is on, and whether that host can reach it by this name"
        )
        raise Unreachable(f"{where} cannot reach {host}:{port}: {failure.text}", hint=hint) from None
    except (paramiko.SSHException, EOFError, OSError) as failure:
        message = f"{where} did not answer when asked for {host}:{port}: {failure}"
        raise Unreachable(message, hint="see whether that host is overloaded or the network slow") from None
    return Tunnel(channel)


class Tunnel:
    """A channel as the socket of another connection, which ends when the far end falls silent.

    No kernel watches that far end for us, and the library would wait for it for ever. Silent is who takes nothing for
    too long, or answers nothing to so much that it can only be a copy, which is acknowledged piece by piece.
    """

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._unanswered_bytes = 0
        self._silent_since_s: float | None = None

    def send(self, data: bytes) -> int:
        """Send some of the data; EOFError where the far end fell silent."""
        try:
            sent = self._channel.send(data)
        except TimeoutError:
            self._grow_impatient()
            raise
        self._unanswered_bytes += sent
        return sent

    def recv(self, size: int) -> bytes:
        """Receive what is there; EOFError where the far end fell silent."""
        try:
            received = self._channel.recv(size)
        except TimeoutError:
            if self._unanswered_bytes > _COPIED_BYTES:
                self._grow_impatient()
            raise
        self._unanswered_bytes, self._silent_since_s = 0, None
        return received

    def _grow_impatient(self) -> None:
        if self._silent_since_s is None:
            self._silent_since_s = time.monotonic()
        elif (time.monotonic() - self._silent_since_s) * 1000 > SILENCE_LIMIT_MS:
            self.close()
            raise EOFError

    def settimeout(self, timeout_s: float | None) -> None:
        """Limit each send and receive."""
        self._channel.settimeout(timeout_s)

    def close(self) -> None:
        """End the channel; the jump host's connection stays."""
        self._channel.close()

    @property
    def _closed(self) -> bool:
        """What the library asks its sockets."""
        return self._channel.closed
