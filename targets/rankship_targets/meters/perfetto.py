"""Reads power rails from a perfetto trace (data source android.power), decoding only the few fields it needs.

Field numbers are those of perfetto's trace_packet.proto and power_rails.proto; the encoding is protobuf's own.
"""

from collections.abc import Iterator

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.meters.readings import Reading, build_trace
from rankship_targets.trials.trace import Channel, Offer, PowerTrace

PACKET, COMPRESSED, POWER_RAILS = 1, 50, 40
DESCRIPTOR, ENERGY = 1, 2
INDEX, RAIL_NAME, RAIL_SUBSYSTEM = 1, 2, 3  # of a descriptor
TIMESTAMP_MS, ENERGY_UJ = 2, 3  # of an energy, beside INDEX; boot time, and microwatt-seconds since boot
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WIDTHS = {FIXED64: 8, FIXED32: 4}
_VARINT_BITS = 64
_STAMP_NS = 1_000_000

Field = tuple[int, int | bytes]


class _Broken(Exception):
    """The bytes are not a message."""


def parse_perfetto(data: bytes, *, where: str) -> PowerTrace:
    """Return every rail with its counter; InputError naming `where` if the bytes are not such a trace."""
    names: dict[int, str] = {}
    rows: list[tuple[int, int, int]] = []
    try:
        for rails in _find_rails(data, where):
            for number, value in read_fields(rails):
                if number == DESCRIPTOR:
                    part = _keep(value)
                    names[_integer(part.get(INDEX, 0))] = _text(part.get(RAIL_NAME, b""))
                elif number == ENERGY:
                    part = _keep(value)
                    if TIMESTAMP_MS in part and ENERGY_UJ in part:
                        row = (part.get(INDEX, 0), part[TIMESTAMP_MS], part[ENERGY_UJ])
                        rows.append((_integer(row[0]), _integer(row[1]), _integer(row[2])))
    except _Broken as failure:
        hint = "record again; the file must be the complete trace that perfetto wrote"
        raise InputError(f"{where} is not a perfetto trace: {failure}", hint=hint) from None
    indices = sorted({index for index, _, _ in rows})
    if not indices:
        hint = "record with the data source android.power and collect_power_rails: true, on a device that has rails"
        raise InputError(f"{where} has no power rails", hint=hint)
    offer = Offer(
        name="perfetto",
        provenance="counter",
        clock="boottime",
        channels=tuple(
            Channel(
                name=names.get(index) or f"rail {index}", unit="uJ", resolution_uj=1, lag_ns=_STAMP_NS, stamped=True
            )
            for index in indices
        ),
    )
    positions = {index: position for position, index in enumerate(indices)}
    readings: list[Reading] = [(positions[index], at_ms * _STAMP_NS, energy) for index, at_ms, energy in rows]
    return build_trace(offer, readings, period_ns=None)


def _find_rails(data: bytes, where: str) -> Iterator[bytes]:
    """Yield every PowerRails message of every packet."""
    for number, packet in read_fields(data):
        if number != PACKET or not isinstance(packet, bytes):
            raise _Broken(f"its top level has field {number}, expected only packets")
        for field, value in read_fields(packet):
            if field == COMPRESSED:
                hint = "record without `compression_type` in the trace's configuration"
                raise InputError(f"{where} has compressed packets", hint=hint)
            if field == POWER_RAILS:
                yield _bytes(value)


def read_fields(data: bytes) -> Iterator[Field]:
    """Yield one message's fields: integers for varints, bytes for everything else; groups are refused."""
    place = 0
    while place < len(data):
        tag, place = _read_varint(data, place)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise _Broken(f"a field without a number at byte {place}")
        if wire == VARINT:
            value, place = _read_varint(data, place)
            yield number, value
            continue
        if wire == BYTES:
            length, place = _read_varint(data, place)
        elif wire in _WIDTHS:
            length = _WIDTHS[wire]
        else:
            raise _Broken(f"wire type {wire} at byte {place}")
        if length > len(data) - place:
            raise _Broken(f"it ends inside a field at byte {place}")
        yield number, data[place : place + length]
        place += length


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, _VARINT_BITS + 6, 7):
        if place >= len(data):
            raise _Broken(f"it ends inside a number at byte {place}")
        value |= (data[place] & 0x7F) << shift
        place += 1
        if not data[place - 1] & 0x80:
            if value >> _VARINT_BITS:
                break
            return value, place
    raise _Broken(f"a number of over {_VARINT_BITS} bits at byte {place}")


def _keep(value: int | bytes) -> dict[int, int | bytes]:
    """Return the last value of each field of a message, as protobuf prescribes."""
    return dict(read_fields(_bytes(value)))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _Broken(f"the number {value} where a message was expected")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _Broken("a message where a number was expected")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode(errors="replace")
