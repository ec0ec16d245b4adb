"""A battery's gauge: its units by physics and by agreement of its own files, the power and the charge drawn.

Drivers leave the kernel's ABI (µA, µV, µAh), most often for mA: a number is believed in the unit in which it can be
true, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .channels import Gauge, Units, describe, make_simple, parse_integer, read_integers
from .system import explain_refusal, find_paths, read_text

CHARGE_STALL_NS = 300_000_000_000
CURRENTS, VOLTAGES, CHARGES = {"uA": 1, "mA": 1000}, {"uV": 1, "mV": 1000}, {"uAh": 1, "mAh": 1000}
NAMES = {"uA": "µA", "mA": "mA", "uV": "µV", "mV": "mV", "uAh": "µAh", "mAh": "mAh"}
CELL_V, LEAST_V, MOST_V = 3.85, 2.4, 30.0  # one cell, and the ends of what batteries of devices have
LEAST_W, MOST_W = 0.1, 25.0  # what a device that is awake draws, for each cell in series
ALIKE = 2  # two files' figures of one power, taken a moment apart
SHORT = 3  # a single reading may exceed MOST_W so many times
LEAST_UAH, MOST_UAH = 300_000, 100_000_000  # of a full battery
LEAST_PERCENT = 5  # of which a full battery's charge can be told
FACTS = ("current_now", "voltage_now", "power_now", "charge_counter", "charge_full", "charge_full_design", "capacity")
Facts = dict[str, Any]  # file → its whole number, or None


class Belief(NamedTuple):
    """The factors to µA, µV and µAh (None: not believed), why, and what keeps the power from being told."""

    current: int | None
    voltage: int | None
    charge: int | None
    notes: list[str]
    problem: str


def find_battery(units: Units | None = None) -> Gauge:
    """Find a battery's gauge: discharge power, and the charge drawn so far; it is wrong while plugged in."""
    channels: list[dict[str, Any]] = []
    readers: list[Callable[[], int | None]] = []
    notes: list[str] = []
    problems: list[str] = []
    told: list[tuple[str, float]] = []
    for folder in find_batteries():
        name = os.path.basename(folder)  # noqa: PTH119 - as above
        facts: Facts = {fact: parse_integer(read_text(f"{folder}/{fact}")) for fact in FACTS}
        if facts["current_now"] is None or facts["voltage_now"] is None:
            problems += explain_silence(folder, name)
            continue
        belief = judge(facts, units or {})
        notes += [f"{name}: {note}" for note in belief.notes]
        if belief.problem:
            problems.append(f"{name}: {belief.problem}")
        if belief.voltage and belief.current:
            # No resolution: the files' whole µA and µV are finer than what the gauge can distinguish.
            channels.append(describe(f"{name}:current*voltage", "uW"))
            readers.append(partial(read_discharge, folder, belief))
            told.append((name, abs(facts["current_now"]) * belief.current / 1e6))
        if belief.voltage and belief.charge:
            channels.append(describe(f"{name}:charge", "uJ", stall_ns=CHARGE_STALL_NS))
            readers.append(make_charge_reader(folder, belief))
    plug = find_plug(find_batteries()[0]) if channels or problems else ""
    problem = plug or ("" if channels else "; ".join(problems) or "no battery reports current and voltage")
    gauge = make_simple("battery", "counter", channels, readers, problem, is_problem=bool(problem))
    gauge.offer["notes"] += notes + find_twins(told) + (problems if channels else [])
    return gauge


def find_batteries() -> list[str]:
    """Find the folders of the device's own batteries: a mouse's or a pen's has the scope "Device"."""
    return [
        path
        for path in find_paths("/sys/class/power_supply/*")
        if read_text(f"{path}/type") == "Battery" and read_text(f"{path}/scope") != "Device"
    ]


def explain_silence(folder: str, name: str) -> list[str]:
    """Return which file of current and voltage refuses to be read, if one does."""
    found = ((fact, explain_refusal(f"{folder}/{fact}")) for fact in ("current_now", "voltage_now"))
    return [f"{name}: {fact} refuses to be read: {why}" for fact, why in found if why]


def find_twins(told: list[tuple[str, float]]) -> list[str]:
    """Return a note if two gauges tell nearly the same current: of one battery, which must not be counted twice."""
    for place, (name, amperes) in enumerate(told):
        for other, others in told[place + 1 :]:
            if abs(amperes - others) <= 0.2 * max(amperes, others):
                return [f"{name} and {other} tell nearly the same current: name one of them as rails, not both"]
    return []


def judge(facts: Facts, units: Units) -> Belief:
    """Decide the units of a gauge's files; the inventory's word (`units`) comes before every guess."""
    voltage, volts, notes, problem = judge_voltage(facts["voltage_now"], units.get("voltage_unit"))
    if voltage is None:
        return Belief(None, None, None, notes, problem)
    current, why, problem = judge_current(facts, volts, units.get("current_unit"))
    charge, doubt = judge_charge(facts)
    return Belief(current, voltage, charge, [*notes, *why, *doubt], problem)


def judge_voltage(raw: int, told: str | None) -> tuple[int | None, float, list[str], str]:
    """Return the factor to µV, the volts, notes, and a problem: the two units cannot both be true."""
    fits = [told] if told else [unit for unit, factor in VOLTAGES.items() if LEAST_V <= raw * factor / 1e6 <= MOST_V]
    if not fits:
        problem = f"voltage_now {raw} is neither µV nor mV of a battery ({LEAST_V:g} to {MOST_V:g} V)"
        return None, 0.0, [], f'{problem}; if you know its unit, add voltage_unit = "mV" to the meter'
    factor = VOLTAGES[fits[0]]
    volts = raw * factor / 1e6
    if told:
        return factor, volts, [f"voltage_now is in {NAMES[told]}, says the inventory: {volts:.2f} V"], ""
    if factor > 1:
        return factor, volts, [f"the gauge tells millivolts: {raw} µV would be {raw / 1e6:.4f} V, which is no cell"], ""
    return factor, volts, [], ""


def judge_current(facts: Facts, volts: float, told: str | None) -> tuple[int | None, list[str], str]:
    """Return the factor to µA, notes, and a problem; decided by the power that it makes, then by the charge's unit."""
    raw = abs(facts["current_now"])
    watts = {unit: raw * factor / 1e6 * volts for unit, factor in CURRENTS.items()}
    if told:
        return CURRENTS[told], [f"current_now is in {NAMES[told]}, says the inventory: {show_watts(watts[told])}"], ""
    cells = max(1, round(volts / CELL_V))
    fits = [unit for unit, power in watts.items() if LEAST_W * cells <= power <= MOST_W * cells]
    at = f"{raw} {{}} at {volts:.1f} V would be {{}}"
    if fits == ["mA"]:
        small = at.format("µA", show_watts(watts["uA"]))
        return CURRENTS["mA"], [f"the gauge tells milliamps: {small}, below what any phone draws"], ""
    if fits == ["uA"]:
        large = at.format("mA", show_watts(watts["mA"]))
        return CURRENTS["uA"], [f"the gauge tells microamps, {show_watts(watts['uA'])}: {large}"], ""
    other = find_other_word(facts, watts)
    if other and LEAST_W * cells / 20 <= watts[other[0]] <= MOST_W * cells * SHORT:
        return CURRENTS[other[0]], [f"the gauge tells {NAMES[other[0]]}, {show_watts(watts[other[0]])}: {other[1]}"], ""
    both = f"{at.format('µA', show_watts(watts['uA']))}, as mA {show_watts(watts['mA'])}"
    expected = f"expected {LEAST_W * cells:g} to {MOST_W * cells:g} W"
    return None, [], f'current_now: {both}; {expected}; if you know its unit, add current_unit = "mA" to the meter'


def find_other_word(facts: Facts, watts: dict[str, float]) -> tuple[str, str] | None:
    """Return the current's unit by what the gauge's other files tell, and which: its power, or its charge."""
    power = (facts["power_now"] or 0) / 1e6
    for unit, told in watts.items():
        if told and 1 / ALIKE <= abs(power) / told <= ALIKE:
            return unit, f"power_now tells {show_watts(abs(power))}"
    factor = judge_full(find_full(facts))
    if factor is None:
        return None
    unit = next(unit for unit, one in CURRENTS.items() if one == factor)
    return unit, f"its charge is in {NAMES[unit]}h too"


def judge_charge(facts: Facts) -> tuple[int | None, list[str]]:
    """Return the factor of charge_counter to µAh, and why it is not plain."""
    counter = facts["charge_counter"]
    if counter is None:
        return None, []
    percent = facts["capacity"] or 0
    own = counter * 100 // percent if LEAST_PERCENT <= percent <= 100 else None  # noqa: PLR2004 - per cent
    factor = judge_full(own) if own is not None else judge_full(find_full(facts)) or judge_full(counter)
    if factor is None:
        return None, [f"charge_counter {counter} is not used: no battery holds so much in µAh or mAh"]
    return factor, [] if factor == 1 else [f"charge_counter {counter} is in mAh: in µAh it would be an empty battery"]


def find_full(facts: Facts) -> int | None:
    """Return the full battery's charge, as the gauge or its driver tells it."""
    full: int | None = facts["charge_full"] or facts["charge_full_design"]
    return full


def judge_full(charge: int | None) -> int | None:
    """Return the factor to µAh of a full battery's charge; None if it can be neither µAh nor mAh."""
    fits = [factor for factor in CHARGES.values() if LEAST_UAH <= (charge or 0) * factor <= MOST_UAH]
    return fits[0] if fits else None


def show_watts(watts: float) -> str:
    """Return a power in watts, to two digits that matter."""
    return f"{watts:,.0f} W" if watts >= 100 else f"{watts:.2g} W"  # noqa: PLR2004 - three digits before the point


def find_plug(folder: str) -> str:
    """Return why a battery's gauge is wrong now; empty while the battery alone feeds the device."""
    for path in find_paths("/sys/class/power_supply/*/online"):
        if read_text(path) not in {"", "0"}:
            return f"plugged in, according to {path}: the gauge then shows the charging current"
    status = read_text(f"{folder}/status")
    return "" if status == "Discharging" else f"plugged in: the battery's status is {status!r}, not 'Discharging'"


def read_discharge(folder: str, belief: Belief) -> int | None:
    """Return the power drawn in microwatts, whatever sign the driver gives the current.

    None while plugged in, and for a reading that no battery can give.
    """
    now = read_integers([f"{folder}/current_now", f"{folder}/voltage_now"])
    if not now or find_plug(folder):
        return None
    volts = now[1] * (belief.voltage or 1) / 1e6
    watts = abs(now[0]) * (belief.current or 1) / 1e6 * volts
    sound = LEAST_V <= volts <= MOST_V and watts <= MOST_W * SHORT * max(1, round(volts / CELL_V))
    return round(watts * 1e6) if sound else None


def make_charge_reader(folder: str, belief: Belief) -> Callable[[], int | None]:
    """Make a counter of the energy drawn: each step of the charge at the mean voltage of its ends."""
    last: list[int] = []
    drawn = [0]
    scale = (belief.charge or 1) * (belief.voltage or 1)

    def read() -> int | None:
        now = read_integers([f"{folder}/charge_counter", f"{folder}/voltage_now"])
        if not now or find_plug(folder):
            last.clear()  # the charge gained in between is not energy drawn
            return None
        if last:
            drawn[0] += scale * (last[0] - now[0]) * 3600 * (last[1] + now[1]) // 2_000_000
        last[:] = now
        return drawn[0]

    return read
