"""Which meter a device has, as its inventory says it."""

from typing import Literal

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.records import record

MeterName = Literal["hwmon", "rails", "powerstats", "battery", "rapl", "model", "perfetto", "bench", "replay"]


@record
class TableColumns:
    """Which columns of a bench meter's table hold what: power, or current and voltage, or energy counted so far."""

    time: str
    time_unit: Literal["s", "ms", "us", "ns"]
    power: str | None = None
    power_unit: Literal["W", "mW", "uW"] = "W"
    current: str | None = None
    current_unit: Literal["A", "mA", "uA"] = "A"
    voltage: str | None = None
    voltage_unit: Literal["V", "mV"] = "V"
    energy: str | None = None
    energy_unit: Literal["J", "mJ", "uJ", "Wh", "mWh"] = "J"


@record
class MeterChoice:
    """Which meter to use: one that the agent reads on the device, or one that leaves a file.

    Keys:
        name: one of the table of meters
        period_us: how often the agent reads it
        rails: the rails that are added up; left out, the only one there is
        calibration_ppm: how far the meter's gain may be from the truth, where somebody has stated it
        file: what the meter leaves on this host
        columns: which columns of a bench meter's table hold what
    """

    name: MeterName
    period_us: int = 10_000
    rails: tuple[str, ...] = ()
    calibration_ppm: int | None = None
    file: str | None = None
    columns: TableColumns | None = None


# Meters that keep time by themselves: nothing yet tells where their clock stands while a suite measures.
OWN_CLOCKS: frozenset[MeterName] = frozenset({"perfetto", "bench"})
_LEAST_PERIOD_US = 100


def check_choice(choice: MeterChoice, where: str) -> None:
    """Refuse what no device's meter can be."""
    if choice.name in OWN_CLOCKS:
        message = f"{where}: meter {choice.name!r} keeps a clock of its own, which is not the device's"
        raise InputError(message, hint="name one that the agent reads on the device, or replay on the device's clock")
    if choice.period_us < _LEAST_PERIOD_US or (choice.calibration_ppm or 0) < 0:
        numbers = f"period_us {choice.period_us} and calibration_ppm {choice.calibration_ppm}"
        raise InputError(f"{where}: {numbers} are out of range", hint="100 µs is the shortest period, 0 the least ppm")
    if len(set(choice.rails)) < len(choice.rails):
        raise InputError(f"{where}: rails {list(choice.rails)} has one twice", hint="each is added up once")
    if (choice.name == "replay") != (choice.file is not None):
        raise InputError(f"{where}: meter {choice.name!r} and `file` do not fit", hint="replay needs one, others none")
