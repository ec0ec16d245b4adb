"""Rests of the device before and after a measurement, with whose power its energy is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .protocol import Event, Request

CALM_S = 0.5  # before a rest: clock frequencies fall, and pending writes reach the disk


def rest_around(request: Request, carry_out: Callable[[Request], Iterator[Event]]) -> Iterator[Event]:
    """Carry out the request, with rests of `idle_ms` before and after if it has this field; `done` comes last."""
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
    """Do nothing for `idle_ms` after a short pause; returns the event with the rest's ends on the monotonic clock."""
    time.sleep(CALM_S)
    start_ns = time.monotonic_ns()
    time.sleep(idle_ms / 1000)
    return {"event": "idle", "when": when, "start_ns": start_ns, "end_ns": time.monotonic_ns()}
