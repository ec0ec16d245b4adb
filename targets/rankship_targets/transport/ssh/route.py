"""The byte stream to a board's SSH port, direct or through another board; nothing is authenticated here."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread, Timer

import paramiko

from rankship_pipeline.foundation.errors import InputError, Unreachable
from rankship_targets.devices.device import Device
from rankship_targets.transport.ssh.alias import read_alias
from rankship_targets.transport.ssh.command import end_link

# A network that drops packets would hang a copy forever; the kernel closes the connection after this long in silence.
SILENCE_LIMIT_MS = 30_000
_REFUSED_BY_POLICY = 1  # RFC 4254's "administratively prohibited"


def dial(where: str, host: str, port: int, timeout_s: float) -> socket.socket:
    """Open a TCP connection that the kernel closes when the other end falls silent."""
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except socket.gaierror as failure:
        alias = None
        with suppress(InputError):  # a host that ssh refuses to look up is unknown all the same
            alias = read_alias(host)
        hint = (
            f'it is an alias of ~/.ssh/config: write host = "{alias.host}" and port = {alias.port} in the inventory'
            if alias is not None and alias.host != host
            else "correct host in the inventory; names that end in .local need mDNS on both machines"
        )
        raise Unreachable(f"{where}: {host!r} is not a known host name: {failure.strerror}", hint=hint) from None
    except TimeoutError:
        message = f"{where}: no answer from {host} within {timeout_s:g} s"
        raise Unreachable(message, hint="check whether the device is on and in this network") from None
    except ConnectionRefusedError:
        message = f"{where}: {host} refused the connection to port {port}"
        raise Unreachable(message, hint="start the device's SSH server, or correct port in the inventory") from None
    except (OSError, UnicodeError) as failure:  # UnicodeError: not a possible host name
        reason = getattr(failure, "strerror", None) or failure
        message = f"{where}: {host} cannot be reached: {reason}"
        raise Unreachable(message, hint="check whether the device is on and in this network") from None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_LIMIT_MS)
    return connection


def dig(where: str, link: paramiko.Transport, host: str, port: int, timeout_s: float) -> paramiko.Channel:
    """Open a channel to another host's port through the connection to a jump host."""
    try:
        return link.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
    except paramiko.ChannelException as failure:
        forbidden = failure.code == _REFUSED_BY_POLICY
        hint = (
            "its sshd_config forbids it: AllowTcpForwarding must allow at least `local`"
            if forbidden
            else "check whether the device is on, and whether that host can reach it by this name"
        )
        raise Unreachable(f"{where} cannot reach {host}:{port}: {failure.text}", hint=hint) from None
    except (paramiko.SSHException, EOFError, OSError) as failure:
        message = f"{where} did not answer a request to connect to {host}:{port}: {failure}"
        raise Unreachable(message, hint="check whether that host is overloaded or the network slow") from None


@contextmanager
def watching(link: paramiko.Transport, pause_s: float) -> Iterator[None]:
    """Watch a connection during the block, in which no large transfer may delay the answers."""
    over = Event()
    watch(link, pause_s, over)
    try:
        yield
    finally:
        over.set()


def watch(link: paramiko.Transport, pause_s: float, over: Event) -> None:
    """Close a connection whose server falls silent unnoticed by the kernel: it hangs, or is behind a jump host.

    Every server answers a request that it does not know, if only to refuse it.
    """

    def send_keepalives() -> None:
        while not over.wait(pause_s) and link.is_active():
            cut = Timer(SILENCE_LIMIT_MS / 1000, end_link, (link,))
            cut.daemon = True
            cut.start()
            try:
                link.global_request("keepalive@openssh.com", wait=True)
            except (paramiko.SSHException, EOFError, OSError):
                return
            finally:
                cut.cancel()

    Thread(target=send_keepalives, daemon=True).start()


CONNECT_TIMEOUT_S = 15.0


def describe_address(device: Device) -> str:
    """Return a device's name and address, as errors show them."""
    through = f", through {device.via.name}" if device.via else ""
    return f"{device.name} ({device.user}@{device.host}:{device.port}{through})"
