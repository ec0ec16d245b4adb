"""The frequency governor of the inventory: set before measurements, and always restored afterwards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from rankship_pipeline.foundation.errors import TargetError
from rankship_targets.client.calls import pick
from rankship_targets.devices.device import Device
from rankship_targets.transport.link import Link
from rankship_targets.transport.protocol import Transport
from rankship_targets.trials.events import Event, Tuned

Ask = Callable[[Transport, Mapping[str, object]], list[Event]]


class HeldGovernor:
    """One device's governor while a session holds the device.

    `ask` sends a request to the agent. `left_set` is whether a session that was killed left a governor set.
    """

    def __init__(self, device: Device, workdir: str, ask: Ask, *, left_set: bool) -> None:
        self.unmet: tuple[str, ...] = ()
        self._device = device
        self._workdir = workdir
        self._ask = ask
        self._is_set = left_set

    @contextmanager
    def restoring(self, link: Link) -> Iterator[None]:
        """Restore the governor after the block if it was set; before it if it was left set and none is wanted now."""
        if self._is_set and self._device.governor is None:
            link.call(self._restore)
            self._is_set = False
        try:
            yield
        finally:
            if self._is_set:
                with suppress(TargetError):  # if the connection is gone, the next session restores it
                    link.call(self._restore)

    def set(self, transport: Transport) -> None:
        """Set the inventory's governor; `unmet` then says what could not be set."""
        if self._device.governor is not None:
            self._is_set = True  # before the attempt: it may succeed although its answer is lost
            request = {"command": "tune", "workdir": self._workdir, "governor": self._device.governor}
            self.unmet = pick(self._ask(transport, request), Tuned, self._device).unmet

    def _restore(self, transport: Transport) -> None:
        self._ask(transport, {"command": "restore", "workdir": self._workdir})
