"""A connection that is made anew: how often, how long, and what the user hears of it."""

import pytest

from rankship_pipeline.foundation.errors import ConnectionLost
from rankship_targets.devices.device import Device
from rankship_targets.transport import link
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.link import RETRIES, Link
from rankship_targets.transport.protocol import Transport

DEVICE = Device(name="pi", transport="local")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PAUSE_S", 0.0)
    monkeypatch.setattr(link, "PATIENCE_S", 0.0)


class Road:
    """A way to a device that is open or not; counts who tries it."""

    def __init__(self) -> None:
        self.open = False
        self.tries = 0

    def connect(self, _: Device) -> Transport:
        self.tries += 1
        if not self.open:
            raise ConnectionLost("nobody there", hint="wait")
        return FakeTransport()


def do_nothing(_: Transport) -> str:
    return "done"


def test_a_way_that_is_gone_is_tried_once_from_then_on_until_it_is_back() -> None:
    road = Road()
    way = Link(DEVICE, road.connect)
    with pytest.raises(ConnectionLost):
        way.call(do_nothing)
    assert road.tries == RETRIES + 1
    with pytest.raises(ConnectionLost):
        way.call(do_nothing)
    assert road.tries == RETRIES + 2
    road.open = True
    assert way.call(do_nothing) == "done"
    way.close()
    road.open, road.tries = False, 0
    with pytest.raises(ConnectionLost):
        way.call(do_nothing)
    assert road.tries == RETRIES + 1


def test_a_patient_call_tells_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PATIENCE_S", 0.05)
    road, heard = Road(), list[str]()
    with pytest.raises(ConnectionLost):
        Link(DEVICE, road.connect, heard.append).call(do_nothing, patient=True)
    assert len(heard) == 1
    assert "pi cannot be reached any more" in heard[0]
