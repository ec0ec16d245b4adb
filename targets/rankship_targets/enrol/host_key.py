"""Fetches the host key of a board, before it is pinned."""

from contextlib import ExitStack

import paramiko

from rankship_pipeline.foundation.errors import Unreachable
from rankship_targets.devices.device import Device


def fetch_host_key(device: Device) -> paramiko.PKey:
    """Return the server's host key, ed25519 if it has one; no login takes place, so no secret is sent."""
    from rankship_targets.transport.ssh.connection import open_way
    from rankship_targets.transport.ssh.route import CONNECT_TIMEOUT_S, describe_address

    where = describe_address(device)
    with ExitStack() as stack:
        jump, way = open_way(device)
        if jump is not None:
            stack.callback(jump.close)
        stack.callback(way.close)
        try:
            link = paramiko.Transport(way)
            stack.callback(link.close)
            link.banner_timeout = CONNECT_TIMEOUT_S
            options = link.get_security_options()
            options.key_types = sorted(options.key_types, key=lambda kind: kind != "ssh-ed25519")
            link.start_client(timeout=CONNECT_TIMEOUT_S)
            return link.get_remote_server_key()
        except (paramiko.SSHException, EOFError, OSError) as failure:
            message = f"{where} shows no host key: {str(failure) or type(failure).__name__}"
            raise Unreachable(message, hint="check whether an SSH server listens on that port") from None
