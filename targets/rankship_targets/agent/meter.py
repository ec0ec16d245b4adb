"""The commands `meters` and `meter`: list the device's gauges, and sample one of them for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .battery import CURRENTS, VOLTAGES
from .channels import Gauge, Reading, Units
from .gauges import GAUGES
from .protocol import Event, Fault, Request

BATCH_NS = 200_000_000
UNITS = {"current_unit": CURRENTS, "voltage_unit": VOLTAGES}  # field → the units that it may name
MIN_PERIOD_US, MAX_DURATION_MS = 100, 24 * 3600 * 1000


def list_meters(request: Request) -> Iterator[Event]:
    """List every known meter: what it offers at this period, or why it cannot be used."""
    period_ns, units = request["period_us"] * 1000, read_units(request)
    yield {"event": "meters", "meters": [find(period_ns, units).offer for find in GAUGES.values()]}
    yield {"event": "done"}


def sample_meter(request: Request) -> Iterator[Event]:
    """Read one meter once in every period until the duration is over; the readings are sent in batches."""
    period_us, duration_ms = request["period_us"], request["duration_ms"]
    if period_us < MIN_PERIOD_US or not 0 < duration_ms <= MAX_DURATION_MS:
        raise Fault("bad_request", f"period {period_us} µs or duration {duration_ms} ms is out of range")
    if request["meter"] not in GAUGES:
        raise Fault("bad_request", f"no meter is called {request['meter']!r}")
    gauge = GAUGES[request["meter"]](period_us * 1000, read_units(request))
    if gauge.offer["problem"]:
        raise Fault("bad_request", f"meter {request['meter']}: {gauge.offer['problem']}")
    start_ns = time.monotonic_ns()
    yield {"event": "metering", "meter": gauge.offer, "start_ns": start_ns}
    yield from read_batches(gauge, start_ns, period_us * 1000, duration_ms * 1_000_000)
    yield {"event": "done"}


def read_units(request: Request) -> Units:
    """Return the inventory's units for the gauge, if it names any."""
    units = {name: request[name] for name in UNITS if request.get(name) is not None}
    for name, unit in units.items():
        if unit not in UNITS[name]:
            raise Fault("bad_request", f"{name} {unit!r} is not one of {', '.join(UNITS[name])}")
    return units


def read_batches(gauge: Gauge, start_ns: int, period_ns: int, duration_ns: int) -> Iterator[Event]:
    """Read at fixed times, one for each period; a time that is missed is skipped, not read late."""
    rows: list[Reading] = []
    beat, batch_end_ns, end_ns = 0, start_ns + BATCH_NS, start_ns + duration_ns
    while True:
        rows += gauge.read()
        now = time.monotonic_ns()
        beat = max(beat + 1, (now - start_ns) // period_ns)
        next_ns = start_ns + beat * period_ns
        if now >= batch_end_ns or next_ns > end_ns:
            yield {"event": "readings", "rows": rows, "until_ns": now}
            rows, batch_end_ns = [], now + BATCH_NS
        if next_ns > end_ns:
            return
        time.sleep(max(0, next_ns - time.monotonic_ns()) / 1e9)
