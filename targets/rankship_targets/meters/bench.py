"""Reads a bench meter's table: comma-separated values with a header line, on the meter's own clock."""

import csv
import io
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.devices.meter_choice import TableColumns
from rankship_targets.meters.readings import LARGEST, build_trace
from rankship_targets.trials.trace import Channel, Offer, PowerTrace

_TO_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_TO_UW = {"W": 10**6, "mW": 10**3, "uW": 1}
_TO_UA = {"A": 10**6, "mA": 10**3, "uA": 1}
_TO_UV = {"V": 10**6, "mV": 10**3}
_TO_UJ = {"J": 10**6, "mJ": 10**3, "uJ": 1, "Wh": 3_600_000_000, "mWh": 3_600_000}

Scaled = list[tuple[str, int]]  # a column and the factor for its numbers


def parse_table(data: bytes, columns: TableColumns, *, where: str) -> PowerTrace:
    """Read the named columns; a line without numbers in them is skipped and counted."""
    try:
        table = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        wanted, divisor = _choose(columns, where)
        found = [name.strip() for name in table.fieldnames or []]
        missing = [name for name in [columns.time, *(name for name, _ in wanted)] if name not in found]
        if missing or len(set(found)) < len(found):
            message = f"{where} has the columns {found}, expected {missing or found}, once each"
            raise InputError(message, hint="name the columns as in the table's first line")
        table.fieldnames = found
        rows = list(_read_rows(table, columns, wanted, divisor))
    except (UnicodeDecodeError, csv.Error) as failure:
        hint = "export it as comma-separated values in UTF-8"
        raise InputError(f"{where} is not a table: {failure}", hint=hint) from None
    counter = columns.energy is not None
    names = "*".join(name for name, _ in wanted)
    channel = Channel(name=names, unit="uJ" if counter else "uW")
    offer = Offer(name="bench", provenance="measured", clock="meter", channels=(channel,))
    return build_trace(offer, [(0, *row) for row in rows], period_ns=None)


def _choose(columns: TableColumns, where: str) -> tuple[Scaled, int]:
    """Return the columns whose product is the value, and the divisor that makes it microwatts or microjoules."""
    power = [(columns.power, _TO_UW[columns.power_unit])] if columns.power else []
    energy = [(columns.energy, _TO_UJ[columns.energy_unit])] if columns.energy else []
    pair: Scaled = []
    if columns.current and columns.voltage:
        pair = [(columns.current, _TO_UA[columns.current_unit]), (columns.voltage, _TO_UV[columns.voltage_unit])]
    chosen = [one for one in (power, energy, pair) if one]
    if len(chosen) != 1:
        message = f"{where}: {len(chosen)} quantities are named by their columns, expected one"
        raise InputError(message, hint="name `power`, or `current` and `voltage`, or `energy`")
    return chosen[0], 10**6 if chosen[0] is pair else 1


def _read_rows(
    table: "csv.DictReader[str]", columns: TableColumns, wanted: Scaled, divisor: int
) -> Iterator[tuple[int, int | None]]:
    last_ns = 0
    for row in table:
        at_ns = _scale(row.get(columns.time), _TO_NS[columns.time_unit])
        if at_ns is None:
            yield last_ns, None
            continue
        last_ns = round(at_ns)
        value = Decimal(1)
        for name, factor in wanted:
            part = _scale(row.get(name), factor)
            if part is None:
                yield last_ns, None
                break
            value *= part
        else:
            value /= divisor
            yield last_ns, round(value) if abs(value) <= LARGEST else None


def _scale(text: str | None, factor: int) -> Decimal | None:
    """Parse a decimal number and multiply it; None for any other text, and for impossibly large numbers."""
    try:
        value = Decimal((text or "").strip()) * factor
    except InvalidOperation:
        return None
    return value if value.is_finite() and abs(value) <= LARGEST else None
