"""A gauge and its channels: their description for the host, and how whole numbers are read from files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .system import read_text

Reading = list[Any]  # position of the channel, monotonic ns, value or None
Units = dict[str, Any]  # the inventory's word on a gauge: current_unit, voltage_unit


class Gauge(NamedTuple):
    """A gauge's description for the host, and a function that reads it once; unused if `offer` has a problem."""

    offer: dict[str, Any]
    read: Callable[[], list[Reading]]


def make_simple(
    name: str,
    provenance: str,
    channels: list[dict[str, Any]],
    readers: list[Callable[[], int | None]],
    problem: str,
    *,
    is_problem: bool = False,
) -> Gauge:
    """Make a gauge that is read channel by channel; `problem` counts without channels, or with `is_problem`."""

    def read() -> list[Reading]:
        rows = []
        for position, reader in enumerate(readers):
            before = time.monotonic_ns()
            value = reader()
            rows.append([position, (before + time.monotonic_ns()) // 2, value])
        return rows

    return Gauge(make_offer(name, provenance, channels, problem if is_problem or not channels else ""), read)


def make_offer(name: str, provenance: str, channels: list[dict[str, Any]], problem: str) -> dict[str, Any]:
    """Return a gauge's description for the host."""
    return {
        "name": name,
        "provenance": provenance,
        "clock": "monotonic",
        "channels": channels,
        "problem": problem or None,
        "notes": [],
    }


def describe(name: str, unit: str, **limits: Any) -> dict[str, Any]:  # noqa: ANN401 - numbers, None or a flag
    """Return a channel's description for the host."""
    return {"name": name, "unit": unit, **limits}


def read_integers(paths: Any) -> list[int]:  # noqa: ANN401 - any sequence of paths
    """Read one whole number from each file; empty if any file has none."""
    values = [parse_integer(read_text(path)) for path in paths]
    return [] if None in values else values  # type: ignore[return-value]  # none is None


def read_integer(path: str) -> int | None:
    """Read a whole number from a file; None if it has none."""
    return parse_integer(read_text(path))


def parse_integer(text: str) -> int | None:
    """Parse a whole number from sysfs; None for anything else."""
    return int(text) if re.fullmatch(r"-?\d{1,19}", text.strip(), re.ASCII) else None
