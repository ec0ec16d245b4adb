"""Meters that record by themselves and write a file: a phone's trace, a bench meter's table, an earlier recording."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError, RankshipError
from rankship_pipeline.foundation.files import write_atomic
from rankship_targets.devices.meter_choice import MeterChoice, MeterName, TableColumns
from rankship_targets.meters.bench import parse_table
from rankship_targets.meters.meter import Reach, require_file
from rankship_targets.meters.perfetto import parse_perfetto
from rankship_targets.trials.trace import Channel, Offer, PowerTrace, Provenance, Rail

LARGEST_BYTES = 1 << 30
Reader = Callable[[Path], PowerTrace]


class FileMeter:
    """A meter whose recording is a file, read on `stop`; the user starts the meter before `start`."""

    def __init__(self, name: str, provenance: Provenance, path: Path, parse: Reader) -> None:
        self._name = name
        self._provenance = provenance
        self._path = path
        self._parse = parse

    def probe(self) -> Offer:
        """Read the file as it is now; if it cannot be read, the offer's `problem` says why."""
        try:
            trace = self._parse(self._path)
        except RankshipError as failure:
            return Offer(name=self._name, provenance=self._provenance, clock="meter", channels=(), problem=str(failure))
        return Offer(
            name=trace.meter,
            provenance=trace.provenance,
            clock=trace.clock,
            channels=tuple(map(_describe, trace.rails)),
            notes=trace.notes,
        )

    def start(self) -> None:
        """Do nothing: the meter records by itself."""

    def stop(self) -> PowerTrace:
        """Read the recording."""
        return self._parse(self._path)


def open_file_meter(choice: MeterChoice, reach: Reach | None) -> FileMeter:  # noqa: ARG001 - every opener's arguments
    """Return the meter for the named file."""
    provenance, make_reader = READERS[choice.name]
    return FileMeter(choice.name, provenance, require_file(choice), make_reader(choice))


def read_recording(path: Path) -> bytes:
    """Read a recording; InputError if it is unreadable or very large."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            message = f"{path} has more than {LARGEST_BYTES} bytes, too many for a power recording"
            raise InputError(message, hint="record less: only power, and only while measuring")
        return path.read_bytes()
    except OSError as failure:
        message = f"cannot read the recording {path}: {failure.strerror}"
        raise InputError(message, hint="name the file that the meter wrote") from None


def write_trace(trace: PowerTrace, path: Path) -> None:
    """Write a trace as JSON, for `replay`."""
    write_atomic(path, encode(trace).encode())


def replay_trace(path: Path) -> PowerTrace:
    """Read a trace that `write_trace` wrote; its meter's name becomes "replay of …", its provenance stays."""
    trace = decode(PowerTrace, read_recording(path), where=str(path))
    for rail in trace.rails:
        _check_rail(rail, path)
    name = trace.meter if trace.meter.startswith("replay of ") else f"replay of {trace.meter}"
    return PowerTrace(
        meter=name,
        provenance=trace.provenance,
        clock=trace.clock,
        period_ns=trace.period_ns,
        rails=trace.rails,
        notes=trace.notes,
    )


def _check_rail(rail: Rail, path: Path) -> None:
    """Refuse a file with a rail that is not valid."""
    kinds = [values for values in (rail.power_uw, rail.energy_uj) if values is not None]
    rising = all(before < after for before, after in pairwise(rail.at_ns))
    if len(kinds) != 1 or len(kinds[0]) != len(rail.at_ns) or not rising:
        message = f"{path}: rail {rail.name} needs one value in one unit at each time, and times that rise"
        raise InputError(message, hint="replay a file that `write_trace` wrote")


def _read_table(path: Path, columns: TableColumns) -> PowerTrace:
    return parse_table(read_recording(path), columns, where=str(path))


def _describe(rail: Rail) -> Channel:
    return Channel(
        name=rail.name,
        unit=rail.unit,
        resolution_uw=rail.resolution_uw,
        resolution_uj=rail.resolution_uj,
        lag_ns=rail.lag_ns,
    )


def _replay(_choice: MeterChoice) -> Reader:
    return replay_trace


def _read_perfetto(_choice: MeterChoice) -> Reader:
    return lambda path: parse_perfetto(read_recording(path), where=str(path))


def _read_bench(choice: MeterChoice) -> Reader:
    columns = choice.columns
    if columns is None:
        raise InputError("meter bench needs `columns`", hint="name at least `time`, `time_unit` and `power`")
    return lambda path: _read_table(path, columns)


# meter → where its numbers come from, and what makes its reader for a choice
READERS: dict[MeterName, tuple[Provenance, Callable[[MeterChoice], Reader]]] = {
    "replay": ("measured", _replay),
    "perfetto": ("counter", _read_perfetto),
    "bench": ("measured", _read_bench),
}
