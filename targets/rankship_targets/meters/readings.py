"""Builds a trace from single readings: sorts them, undoes wraps, drops repeats, finds gaps, and invents no values."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd

from rankship_targets.trials.trace import Channel, Gap, Offer, PowerTrace, Rail, Why

Reading = tuple[int, int, int | None]  # index of the channel, time in ns, value in the channel's unit or None
_LATE_FACTOR = 5  # a sample that comes this many periods after the last leaves a gap
LARGEST = 2**63  # no meter's values are larger


def build_trace(
    offer: Offer,
    readings: Iterable[Reading],
    *,
    period_ns: int | None,
    start_ns: int | None = None,
    end_ns: int | None = None,
) -> PowerTrace:
    """Sort readings into rails; `start_ns` and `end_ns` are when sampling began and ended, if known."""
    by_channel: list[list[tuple[int, int | None]]] = [[] for _ in offer.channels]
    for position, at_ns, value in readings:
        by_channel[position].append((at_ns, value))
    rails = [
        build_rail(channel, rows, period_ns=period_ns, start_ns=start_ns, end_ns=end_ns)
        for channel, rows in zip(offer.channels, by_channel, strict=True)
    ]
    return PowerTrace(
        meter=offer.name,
        provenance=offer.provenance,
        clock=offer.clock,
        period_ns=period_ns,
        rails=tuple(rails),
        notes=offer.notes,
    )


@dataclass
class _RailInProgress:
    """One channel's rail while its readings are added: `times` and `values` are the samples so far."""

    channel: Channel
    allowed_ns: int  # the longest time between two samples that is not a gap
    times: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    skipped: int = 0
    missing_since: int | None = None  # the time of the first failed reading since the last sample
    last_raw: int = 0  # the last sample as the meter reported it
    added: int = 0  # added to every sample of a counter, so that it continues after a wrap or a reset

    @property
    def counts(self) -> bool:
        """Whether the channel is a counter of energy, not a reading of power."""
        return self.channel.unit == "uJ"

    def take(self, at_ns: int, value: int | None) -> None:
        """Add a reading as a sample, or count it as skipped; a repeat of a stamped sample is ignored."""
        if self.channel.stamped and self.times and (at_ns, value) == (self.times[-1], self.last_raw):
            return
        if value is None or abs(value) > LARGEST or (self.times and at_ns <= self.times[-1]):
            self.skipped += 1
            self.missing_since = at_ns if self.missing_since is None else self.missing_since
            return
        if self.counts and self.times and value < self.last_raw:
            self._go_on_from(at_ns, value)
        if self.times and at_ns - self.times[-1] > self.allowed_ns:
            why = _explain(self.channel, self.missing_since)
            self.gaps.append(Gap(start_ns=self.times[-1], end_ns=at_ns, why=why))
        self.times.append(at_ns)
        self.values.append(value + self.added)
        self.last_raw, self.missing_since = value, None

    def _go_on_from(self, at_ns: int, value: int) -> None:
        """Continue a rail whose counter fell: a wrap adds the counter's range, a reset the value before it."""
        if _has_wrapped(self.channel, self.last_raw, value):
            self.added += self.channel.wrap_uj or 0
        else:
            self.added += self.last_raw - value
            self.gaps.append(Gap(start_ns=self.times[-1], end_ns=at_ns, why="reset"))

    def finish(self, start_ns: int | None, end_ns: int | None) -> Rail:
        """Return the rail, with the gaps that only all samples together show, and the step of the values."""
        channel, times, values = self.channel, self.times, self.values
        gaps = self.gaps + _find_ends(channel, times, (start_ns, end_ns), self.allowed_ns, self.missing_since)
        step = _find_counter_step(values) if self.counts else _find_power_step(values)
        if self.counts and channel.stall_ns is not None:
            gaps += find_stalls(times, values, channel.stall_ns)
        elif self.counts and (channel.resolution_uj or step) is None and len(times) > 1:
            # the counter's step may be larger than all the energy drawn
            gaps.append(Gap(start_ns=times[0], end_ns=times[-1], why="stalled"))
        return Rail(
            name=channel.name,
            at_ns=tuple(times),
            power_uw=None if self.counts else tuple(values),
            energy_uj=tuple(values) if self.counts else None,
            resolution_uw=None if self.counts else channel.resolution_uw or step,
            resolution_uj=channel.resolution_uj or step if self.counts else None,
            lag_ns=channel.lag_ns,
            gaps=tuple(sorted(gaps, key=lambda gap: gap.start_ns)),
            skipped=self.skipped,
        )


def build_rail(
    channel: Channel,
    rows: Sequence[tuple[int, int | None]],
    *,
    period_ns: int | None,
    start_ns: int | None = None,
    end_ns: int | None = None,
) -> Rail:
    """Build a rail of the valid readings: undo a counter's wraps and find every gap."""
    period = period_ns or _guess_period(rows)
    rail = _RailInProgress(channel, allowed_ns=_LATE_FACTOR * max(period, channel.lag_ns))
    for at_ns, value in rows:
        rail.take(at_ns, value)
    return rail.finish(start_ns, end_ns)


def find_stalls(times: Sequence[int], values: Sequence[int], stall_ns: int) -> list[Gap]:
    """Return every stretch of at least `stall_ns` in which a counter did not change."""
    found, since = list[Gap](), 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[since]:
            if i - 1 > since and times[i - 1] - times[since] >= stall_ns:
                found.append(Gap(start_ns=times[since], end_ns=times[i - 1], why="stalled"))
            since = i
    return found


def _has_wrapped(channel: Channel, before: int, after: int) -> bool:
    """Return whether a counter that fell has wrapped: only if it rose by less than half its range."""
    return channel.wrap_uj is not None and before <= channel.wrap_uj and 2 * (before - after) > channel.wrap_uj


def _find_ends(
    channel: Channel,
    times: list[int],
    span: tuple[int | None, int | None],
    allowed_ns: int,
    missing_since: int | None,
) -> list[Gap]:
    """Return the gaps between the beginning of sampling and the first sample, and after the last one."""
    start_ns, end_ns = span
    if not times:
        whole = start_ns is not None and end_ns is not None and end_ns > start_ns
        return [Gap(start_ns=start_ns or 0, end_ns=end_ns or 0, why="unreadable")] if whole else []
    found = []
    if start_ns is not None and times[0] - start_ns > allowed_ns:
        found.append(Gap(start_ns=start_ns, end_ns=times[0], why="unreadable"))
    if end_ns is not None and end_ns - times[-1] > allowed_ns:
        found.append(Gap(start_ns=times[-1], end_ns=end_ns, why=_explain(channel, missing_since)))
    return found


def _explain(channel: Channel, missing_since: int | None) -> Why:
    if missing_since is not None:
        return "unreadable"
    return "stalled" if channel.stamped else "missed"


def _guess_period(rows: Sequence[tuple[int, int | None]]) -> int:
    """Return the median time between rows, for a meter whose period is not known."""
    steps = sorted(after[0] - before[0] for before, after in pairwise(rows) if after[0] > before[0])
    return steps[len(steps) // 2] if steps else 0


def _find_power_step(values: Sequence[int]) -> int | None:
    """Return the step of which all changes are multiples; None if nothing changed."""
    return gcd(*(after - before for before, after in pairwise(values))) or None


def _find_counter_step(values: Sequence[int]) -> int | None:
    """Return the smallest rise, which is one step or several; None if nothing rose."""
    return min((after - before for before, after in pairwise(values) if after > before), default=None)
