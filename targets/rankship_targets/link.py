"""A connection that is made anew when it breaks, a bounded number of times, and counts that."""

import time
from collections.abc import Callable
from typing import TypeVar

from rankship_pipeline.errors import ConnectionLost, TargetTimeout
from rankship_targets.device import Device
from rankship_targets.transport import Transport

RETRIES = 2
PAUSE_S = 0.5

T = TypeVar("T")


class Link:
    """One device's transport, opened on first use; `retries` counts everything that had to be tried again."""

    def __init__(self, device: Device, connect: Callable[[Device], Transport]) -> None:
        self.retries = 0
        self._device = device
        self._connect = connect
        self._transport: Transport | None = None

    def call(self, step: Callable[[Transport], T], *, retry_timeouts: bool = True) -> T:
        """Do one step, again over a new connection where the old one broke.

        Long work must not be repeated after a timeout (`retry_timeouts=False`): its limit was generous already.
        """
        transient = (ConnectionLost, TargetTimeout) if retry_timeouts else (ConnectionLost,)
        for _ in range(RETRIES):
            try:
                return step(self._open())
            except transient:
                self.retries += 1
                self.close()
                time.sleep(PAUSE_S)
        return step(self._open())

    def close(self) -> None:
        """End the connection; the next call opens another."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def _open(self) -> Transport:
        if self._transport is None:
            self._transport = self._connect(self._device)
        return self._transport
