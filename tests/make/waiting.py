"""Waits for conditions, in place of sleeps."""

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

_PAUSE_S = 0.02
_LONG_S = 60.0


def wait_until(condition: Callable[[], object], timeout_s: float = _LONG_S) -> None:
    """Return as soon as `condition()` holds; fail where it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still false after {timeout_s:g} s: {condition}"
        time.sleep(_PAUSE_S)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has reaped yet does not."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
