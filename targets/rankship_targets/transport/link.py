"""A connection that is opened again when it breaks, a limited number of times, and counts its retries."""

import time
from collections.abc import Callable
from typing import TypeVar

from rankship_pipeline.foundation.errors import AgentDied, ConnectionLost, Rebooted, TargetTimeout
from rankship_targets.devices.device import Device
from rankship_targets.transport.protocol import Transport

RETRIES = 2
PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
# How long a device may be unreachable while a run goes on there: a cable is put back, a board boots.
PATIENCE_S = 90.0

T = TypeVar("T")


class Link:
    """One device's transport, opened on first use; `retries` counts all steps that were tried again.

    After a call has used up its tries on a broken connection, later calls (a session's clean-up) get one try each,
    until one succeeds.
    """

    def __init__(
        self, device: Device, connect: Callable[[Device], Transport], on_news: Callable[[str], None] = lambda _: None
    ) -> None:
        self.retries = 0
        self._on_news = on_news
        self._device = device
        self._connect = connect
        self._transport: Transport | None = None
        self._gone = False

    def call(self, step: Callable[[Transport], T], *, retry_timeouts: bool = True, patient: bool = False) -> T:
        """Run one step, and again over a new connection if the old one broke; a reboot is not retried.

        Long work is not repeated after a timeout or its agent's death (`retry_timeouts=False`): its limit was generous.
        With `patient`, waits PATIENCE_S for a device that cannot be reached any more, and reports this.
        """
        transient = (ConnectionLost, TargetTimeout, AgentDied) if retry_timeouts else (ConnectionLost,)
        for _ in range(0 if self._gone else RETRIES):
            try:
                return step(self._open())
            except Rebooted:
                raise
            except transient:
                self.retries += 1
                self.close()
                time.sleep(PAUSE_S)
            if patient:
                self._await_return()
        try:
            result = step(self._open())
        except (ConnectionLost, TargetTimeout):
            self._gone = True
            raise
        self._gone = False
        return result

    def _await_return(self) -> None:
        """Connect again, trying for PATIENCE_S."""
        deadline, pause_s = time.monotonic() + PATIENCE_S, PAUSE_S
        while True:
            try:
                self._open()
            except (ConnectionLost, TargetTimeout):
                if time.monotonic() >= deadline:
                    self._gone = True
                    raise
                if pause_s == PAUSE_S:
                    self._on_news(
                        f"{self._device.name} cannot be reached any more: waiting up to {PATIENCE_S:g} s for it"
                    )
            else:
                return
            pause_s = min(max(2 * pause_s, 0.1), LONGEST_PAUSE_S)
            time.sleep(pause_s)

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def _open(self) -> Transport:
        if self._transport is None:
            self._transport = self._connect(self._device)
        return self._transport
