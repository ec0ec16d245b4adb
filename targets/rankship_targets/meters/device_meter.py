"""A meter that the agent reads on the device, streamed to this host while something is measured there."""

import threading
from collections.abc import Generator
from contextlib import closing
from typing import cast

from rankship_pipeline.foundation.errors import InputError, Lacks, MeasurementError, RankshipError, TargetTimeout
from rankship_targets.client.calls import call_agent, pick
from rankship_targets.devices.meter_choice import MeterChoice
from rankship_targets.meters.meter import Reach
from rankship_targets.meters.readings import Reading, build_trace
from rankship_targets.transport.protocol import STEP_TIMEOUT_S
from rankship_targets.trials.events import Event, Metering, Meters, Readings
from rankship_targets.trials.trace import Offer, PowerTrace

_BATCHES_AFTER = 2  # the first batch to arrive after `stop` may have been read before it
_SLACK_S = 60.0
_SAME_RELEASE = "the agent and this host must be of the same release: reconnect, and the agent is copied again"


class DeviceMeter:
    """One of the agent's meters; the recording ends with `stop`, at the limit, or when the connection breaks."""

    def __init__(self, choice: MeterChoice, reach: Reach) -> None:
        self._choice = choice
        self._reach = reach
        self._recording: _Recording | None = None

    def probe(self) -> Offer:
        """Return the meter's description from the agent."""
        device, request = self._reach.device, {"command": "meters", **_describe(self._choice)}
        with self._reach.connect(device) as transport:
            events = list(call_agent(transport, device, self._reach.agent, request, timeout_s=STEP_TIMEOUT_S))
        offers = {offer.name: offer for offer in pick(events, Meters, device).meters}
        if self._choice.name not in offers:
            known = ", ".join(offers)
            raise Lacks(f"the agent on {device.name} has no meter {self._choice.name!r}", hint=f"it has {known}")
        return offers[self._choice.name]

    def start(self) -> None:
        """Begin to record, while other programs run on the device."""
        if self._recording is not None:
            raise RuntimeError(f"meter {self._choice.name} is already recording")
        problem = self.probe().problem
        if problem:
            message = f"{self._reach.device.name}: meter {self._choice.name}: {problem}"
            raise Lacks(message, hint="choose another meter, or fix what the message names")
        recording = _Recording(self._choice, self._reach)
        recording.start()
        self._recording = recording

    def stop(self) -> PowerTrace:
        """End the recording; returns the trace of all readings."""
        recording, self._recording = self._recording, None
        if recording is None:
            raise RuntimeError(f"meter {self._choice.name} is not recording")
        return recording.finish()


def _describe(choice: MeterChoice) -> dict[str, object]:
    """Return the request's fields about how a meter is read; units only where the inventory names them."""
    units = {"current_unit": choice.current_unit, "voltage_unit": choice.voltage_unit}
    return {"period_us": choice.period_us, **{name: unit for name, unit in units.items() if unit is not None}}


class _Recording(threading.Thread):
    """The stream of one recording, read in a thread until `finish`."""

    def __init__(self, choice: MeterChoice, reach: Reach) -> None:
        super().__init__(name=f"meter {choice.name}", daemon=True)
        self._choice = choice
        self._reach = reach
        self._begun = threading.Event()
        self._enough = threading.Event()
        self._metering: Metering | None = None
        self._rows: list[Reading] = []
        self._until_ns: int | None = None
        self._failure: Exception | None = None

    def start(self) -> None:
        """Start the thread and wait until readings are taken."""
        super().start()
        self._begun.wait()
        if self._failure is not None:
            raise self._failure

    def finish(self) -> PowerTrace:
        """Wait for the last batches and make the trace."""
        self._enough.set()
        self.join(_SLACK_S)
        if self.is_alive():
            message = f"{self._reach.device.name}: meter {self._choice.name} sent nothing for {_SLACK_S:g} s"
            raise TargetTimeout(message, hint="check whether the device still answers")
        if self._failure is not None:
            raise self._failure
        if self._metering is None:
            message = f"meter {self._choice.name} did not begin"
            raise MeasurementError(message, hint=_SAME_RELEASE)
        return build_trace(
            self._metering.meter,
            self._rows,
            period_ns=self._choice.period_us * 1000,
            start_ns=self._metering.start_ns,
            end_ns=self._until_ns,
        )

    def run(self) -> None:
        """Read the stream; an error is kept for `finish`."""
        try:
            with self._reach.connect(self._reach.device) as transport:
                request = {
                    "command": "meter",
                    "meter": self._choice.name,
                    **_describe(self._choice),
                    "duration_ms": self._reach.limit_ms,
                }
                timeout_s = self._reach.limit_ms / 1000 + _SLACK_S
                events = call_agent(transport, self._reach.device, self._reach.agent, request, timeout_s=timeout_s)
                with closing(cast("Generator[Event]", events)):
                    self._take(cast("Generator[Event]", events))
        except (RankshipError, OSError) as failure:
            self._failure = failure
        finally:
            self._begun.set()

    def _take(self, events: Generator[Event]) -> None:
        after = 0
        for event in events:
            if isinstance(event, Metering):
                self._metering = event
                self._begun.set()
            elif isinstance(event, Readings):
                self._rows += self._check(event)
                self._until_ns = event.until_ns
                after += self._enough.is_set()
                if after >= _BATCHES_AFTER:
                    return

    def _check(self, event: Readings) -> list[Reading]:
        count = len(self._metering.meter.channels) if self._metering else 0
        if any(not 0 <= position < count for position, _, _ in event.rows):
            message = f"meter {self._choice.name} sent a reading of a channel that it does not have"
            raise MeasurementError(message, hint=_SAME_RELEASE)
        return list(event.rows)


def open_device_meter(choice: MeterChoice, reach: Reach | None) -> DeviceMeter:
    """Return one of the agent's meters."""
    if reach is None:
        raise InputError(
            f"meter {choice.name} is read on a device", hint="name a device, or choose a meter that writes files"
        )
    return DeviceMeter(choice, reach)
