"""Power traces: what a meter saw, rail by rail, with everything that limits what may be concluded from it."""

from itertools import pairwise
from statistics import median
from typing import Literal

from rankship_pipeline.foundation.records import record

# An external meter or sensor; an on-device energy counter or gauge; utilisation times constants.
Provenance = Literal["measured", "counter", "modelled"]
Clock = Literal["monotonic", "boottime", "meter"]  # the device's two clocks, or the meter's own
Why = Literal["missed", "unreadable", "stalled", "reset"]


@record
class Channel:
    """One thing that a meter reads.

    `unit` is uW for power, uJ for a cumulative counter. `resolution_uw` and `resolution_uj` are the smallest step of
    the value in that unit (None where the meter does not tell). A value may describe a moment up to `lag_ns` before
    its time. `wrap_uj` is where a counter starts again (None: never). A counter that stays the same for `stall_ns`
    has stalled (None: it may rest). `stamped` values come with the meter's own time, so one may be read twice.
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
    """What a meter is and has; `problem` says why it must not be used now, `notes` what to know when it is used."""

    name: str
    provenance: Provenance
    clock: Clock
    channels: tuple[Channel, ...]
    problem: str | None = None
    notes: tuple[str, ...] = ()


@record
class Gap:
    """A stretch about which a rail tells nothing, and why."""

    start_ns: int
    end_ns: int
    why: Why


@record
class Rail:
    """One channel's samples in order of time: `power_uw`, or `energy_uj` of a counter with its wraps undone.

    Exactly one of the two is there, as long as `at_ns`, which rises strictly. `skipped` counts the readings that were
    none; readings that only repeated a stamped value are not counted.
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
