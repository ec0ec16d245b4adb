"""Stretches in which the device rests, before and after a measurement: what its energy is held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .protocol import Event, Request

CALM_S = 0.5  # clocks fall and the disk has what was said before a rest begins


def rest_around(request: Request, carry_out: Callable[[Request], Iterator[Event]]) -> Iterator[Event]:
    """Rest, carry out the request, and rest again, where it asks for rests of `idle_ms`; the last word comes then."""
    idle_ms = request.get("idle_ms")
    if idle_ms is None:
        yield from carry_out(request)
        return
    yield rest("before", idle_ms)
    for event in carry_out(request):
        if event["event"] != "done":
            yield event
    yield rest("after", idle_ms)
    yield {"event": "done"}


def rest(when: str, idle_ms: int) -> Event:
    """Do nothing for so long, once the device has calmed down; gives when that was, on the monotonic clock."""
    time.sleep(CALM_S)
    start_ns = time.monotonic_ns()
    time.sleep(idle_ms / 1000)
    return {"event": "idle", "when": when, "start_ns": start_ns, "end_ns": time.monotonic_ns()}
