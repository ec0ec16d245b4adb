"""Which meter a device has, according to its inventory."""

from typing import Literal

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record

MeterName = Literal["hwmon", "rails", "powerstats", "battery", "rapl", "model", "perfetto", "bench", "replay"]


@record
class TableColumns:
    """The columns of a bench meter's table: power, or current and voltage, or cumulative energy."""

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
        name: one of the known meters
        period_us: how often the agent reads it
        rails: the rails to add up; by default the meter's only rail
        calibration_ppm: the greatest error of the meter's gain, if it is stated
        current_unit: of a battery's gauge, where the doctor's guess is wrong: the driver's unit, not the ABI's µA
        voltage_unit: the same for its voltage
        file: the file that the meter writes on this host
        columns: the columns of a bench meter's table
    """

    name: MeterName
    period_us: int = 10_000
    rails: tuple[str, ...] = ()
    calibration_ppm: int | None = None
    current_unit: Literal["uA", "mA"] | None = None
    voltage_unit: Literal["uV", "mV"] | None = None
    file: str | None = None
    columns: TableColumns | None = None


# Meters with a clock of their own: its offset from the device's clock is not known while a suite measures.
OWN_CLOCKS: frozenset[MeterName] = frozenset({"perfetto", "bench"})
_LEAST_PERIOD_US = 100


def check_choice(choice: MeterChoice, where: str) -> None:
    """Refuse a choice that no device's meter can have."""
    if choice.name in OWN_CLOCKS:
        message = f"{where}: meter {choice.name!r} has a clock of its own, not the device's"
        raise InputError(message, hint="name a meter that the agent reads on the device, or replay by its clock")
    if choice.period_us < _LEAST_PERIOD_US or (choice.calibration_ppm or 0) < 0:
        numbers = f"period_us {choice.period_us} and calibration_ppm {choice.calibration_ppm}"
        raise InputError(f"{where}: {numbers} are out of range", hint="use at least 100 µs and at least 0 ppm")
    if choice.name != "battery" and (choice.current_unit or choice.voltage_unit):
        message = f"{where}: current_unit and voltage_unit are for meter 'battery', not {choice.name!r}"
        raise InputError(message, hint="remove them: other meters tell their units themselves")
    if len(set(choice.rails)) < len(choice.rails):
        raise InputError(f"{where}: rails {list(choice.rails)} names a rail twice", hint="name each rail once")
    if (choice.name == "replay") != (choice.file is not None):
        message = f"{where}: meter {choice.name!r} {'needs' if choice.file is None else 'takes no'} `file`"
        raise InputError(message, hint="only meter 'replay' has `file`: the recording to read")
