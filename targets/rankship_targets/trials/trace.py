"""Power traces: a meter's samples, rail by rail, with their gaps, resolution and lag."""

from itertools import pairwise
from statistics import median
from typing import Literal

from rankship_pipeline.foundation.frozen import record

# An external meter or sensor; an on-device energy counter or gauge; utilisation times constants.
Provenance = Literal["measured", "counter", "modelled"]
Clock = Literal["monotonic", "boottime", "meter"]  # the device's two clocks, or the meter's own
Why = Literal["missed", "unreadable", "stalled", "reset"]


@record
class Channel:
    """One quantity that a meter reads.

    `unit` is uW for power, uJ for a cumulative counter. `resolution_uw` and `resolution_uj` are the smallest step of
    the value in that unit (None: not known). A value may describe a moment up to `lag_ns` before its time. `wrap_uj`
    is the value at which a counter starts again from 0 (None: never). A counter that does not change for `stall_ns`
    has stalled (None: it may stay the same). `stamped` values come with the meter's own time, so that one value may
    be read twice.
    """

    name: str
    unit: Literal["uW", "uJ"]
    resolution_uw: int | None = None
    resolution_uj: int | None = None
    lag_ns: int = 0
    wrap_uj: int | None = None
    stall_ns: int | None = None
    stamped: bool = False


@record
class Offer:
    """A meter and its channels; `problem` says why it cannot be used now, `notes` what to know when using it."""

    name: str
    provenance: Provenance
    clock: Clock
    channels: tuple[Channel, ...]
    problem: str | None = None
    notes: tuple[str, ...] = ()


@record
class Gap:
    """A stretch of time without usable readings of a rail, and the reason."""

    start_ns: int
    end_ns: int
    why: Why


@record
class Rail:
    """One channel's samples in order of time: `power_uw`, or `energy_uj` of a counter with its wraps undone.

    Exactly one of the two is set, of the same length as `at_ns`, which rises strictly. `skipped` counts the readings
    without a value; readings that only repeated a stamped value are not counted.
    """

    name: str
    at_ns: tuple[int, ...]
    power_uw: tuple[int, ...] | None
    energy_uj: tuple[int, ...] | None
    resolution_uw: int | None
    resolution_uj: int | None
    lag_ns: int
    gaps: tuple[Gap, ...]
    skipped: int

    @property
    def unit(self) -> Literal["uW", "uJ"]:
        """The unit of the samples."""
        return "uJ" if self.power_uw is None else "uW"

    @property
    def seen_period_ns(self) -> int | None:
        """The median time between samples; None with fewer than two."""
        steps = [after - before for before, after in pairwise(self.at_ns)]
        return round(median(steps)) if steps else None


@record
class PowerTrace:
    """What one meter recorded; `period_ns` is the sampling period asked for (None: the meter's own)."""

    meter: str
    provenance: Provenance
    clock: Clock
    period_ns: int | None
    rails: tuple[Rail, ...]
    notes: tuple[str, ...] = ()
