"""Detached runs: they go on without a connection, and are found again by their name after it broke."""

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime

from rankship_pipeline.foundation.errors import AgentDied, Rebooted, TargetError, TargetTimeout
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_celsius
from rankship_targets.client.calls import call_agent, pick
from rankship_targets.devices.device import Device
from rankship_targets.transport.link import Link
from rankship_targets.transport.protocol import STEP_TIMEOUT_S, Transport
from rankship_targets.trials.events import Cooling, Done, Event, Spooled

REPEATS = 1  # how often a run that died on the device is started again


@record
class Ticket:
    """A run's name on the device and when the name was made, by the host's clock (ISO 8601).

    With a ticket that was saved before the run started, another process too can find its result.
    """

    run: str
    started_utc: str


def make_ticket() -> Ticket:
    """Return a new name for a run that has not started."""
    return Ticket(run=secrets.token_hex(12), started_utc=datetime.now(UTC).isoformat(timespec="milliseconds"))


class DetachedRuns:
    """The detached runs of one device; `on_news` is called with a message about each long wait."""

    def __init__(self, device: Device, link: Link, agent: str, workdir: str, on_news: Callable[[str], None]) -> None:
        self._device = device
        self._link = link
        self._agent = agent
        self._workdir = workdir
        self._on_news = on_news

    def carry_out(
        self, run: str, request: Mapping[str, object], timeout_s: float, prepare: Callable[[Transport], None]
    ) -> list[Event]:
        """Start a run, or find it again, and return its events once it is done.

        `prepare` is called before each start. A run that died, or whose device was restarted, is started again REPEATS
        times; one that takes too long is cancelled. Its result stays on the device until `forget`.
        """
        deadline = time.monotonic() + timeout_s
        events: list[Event] = []
        born = ""
        for attempt in range(REPEATS + 1):
            try:
                before, born = born, self._start(run, request, prepare)
                if born != before:
                    events.clear()  # those of a run that died
                self._follow(run, events, deadline)
            except (AgentDied, Rebooted):
                if attempt == REPEATS:
                    raise
                self._link.retries += 1
            except TargetTimeout:
                with suppress(TargetError):
                    self.forget(run)
                raise
            else:
                break
        return events

    def forget(self, run: str) -> None:
        """End a run if it is still going on, and remove its files from the device."""
        self._link.call(lambda transport: self._ask(transport, {"command": "cancel", "run": run}))

    def _start(self, run: str, request: Mapping[str, object], prepare: Callable[[Transport], None]) -> str:
        """Start the run unless it is going on or finished; returns the id of this start."""

        def step(transport: Transport) -> str:
            prepare(transport)
            events = self._ask(transport, {"command": "spool", "run": run, "request": request})
            return pick(events, Spooled, self._device).born

        return self._link.call(step, patient=True)

    def _follow(self, run: str, events: list[Event], deadline: float) -> None:
        """Append the run's events as they come, over as many connections as the link allows."""

        def step(transport: Transport) -> None:
            if events and isinstance(events[-1], Done):
                return
            request = {"command": "fetch", "workdir": self._workdir, "run": run, "offset": len(events)}
            left_s = max(1.0, deadline - time.monotonic())
            for event in call_agent(transport, self._device, self._agent, request, timeout_s=left_s):
                events.append(event)
                if isinstance(event, Cooling):
                    self._on_news(f"{self._device.name} cools down: {show_celsius(event.temperature_mc)}")

        self._link.call(step, retry_timeouts=False, patient=True)

    def _ask(self, transport: Transport, request: Mapping[str, object]) -> list[Event]:
        whole = {**request, "workdir": self._workdir}
        return list(call_agent(transport, self._device, self._agent, whole, timeout_s=STEP_TIMEOUT_S))
