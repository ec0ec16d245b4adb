"""Waits until an SSH server on the loopback interface answers: an open port alone proves nothing."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress

_PAUSE_S = 0.1
_GREETING = b"SSH-"


def find_free_port() -> int:
    """Return a TCP port on the loopback interface that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def await_banner(port: int, *, alive: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for an SSH server's greeting; False if the time passes or `alive` returns False."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and alive():
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
            if connection.recv(len(_GREETING)) == _GREETING:
                return True
        time.sleep(_PAUSE_S)
    return False
