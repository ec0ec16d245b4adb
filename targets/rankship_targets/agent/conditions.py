"""Sets the conditions before timing: the cores to run on, and a device that has cooled down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator

from .protocol import Event, Fault, Request
from .thermal import read_belief

MOST_CORES = 1024
READ_S, REPORT_S = 1.0, 10.0  # how often the temperature is read and reported


def settle(request: Request, carry_out: Callable[[Request], Iterator[Event]]) -> Iterator[Event]:
    """Set the conditions, report which could not be set, then carry out the request."""
    unmet = bind_to(request.get("cpus"))
    began = time.monotonic()
    limit_mc = request.get("cool_below_mc")
    if limit_mc is not None:
        unmet += yield from cool_down(limit_mc, (request.get("max_cooling_ms") or 0) / 1000)
    cooling_ms = round((time.monotonic() - began) * 1000)
    cores = sorted(os.sched_getaffinity(0))
    yield {"event": "settled", "cpus": cores, "cooling_ms": cooling_ms, "unmet": unmet}
    yield from carry_out(request)


def bind_to(cpus: list[int] | None) -> list[str]:
    """Bind this process and its later threads to these cores; returns what could not be done."""
    if cpus is None:
        return []
    if not cpus or not all(type(core) is int and 0 <= core < MOST_CORES for core in cpus):
        raise Fault("bad_request", f"cpus must be core numbers, got {cpus}")
    named = ", ".join(map(str, sorted(set(cpus))))
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as failure:
        return [f"cores {named}: {failure.strerror}"]
    absent = sorted(set(cpus) - os.sched_getaffinity(0))
    return [f"cores {named}: the device does not have {', '.join(map(str, absent))}"] if absent else []


def cool_down(limit_mc: int, patience_s: float) -> Generator[Event, None, list[str]]:
    """Wait until the device is below a temperature, reporting it meanwhile; returns why that was not reached."""
    deadline, reported_at = time.monotonic() + patience_s, 0.0
    while True:
        belief = read_belief()
        temperature = belief.mc
        if temperature is None:
            return [f"below {limit_mc} m°C: {belief.why}"]
        if temperature < limit_mc:
            return []
        now = time.monotonic()
        if now >= deadline:
            return [f"below {limit_mc} m°C: still {temperature} m°C after {patience_s:g} s"]
        if not reported_at or now - reported_at >= REPORT_S:
            reported_at = now
            yield {"event": "cooling", "temperature_mc": temperature}
        time.sleep(min(READ_S, max(0.0, deadline - now)))
