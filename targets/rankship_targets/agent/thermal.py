"""Which of a device's temperatures is the processor's: by the zones' names, by physics, and by their agreement."""

from __future__ import annotations

import re
from typing import NamedTuple

from .system import explain_refusal, find_paths, query_psutil, read_text

COLDEST_MC, HOTTEST_MC = -30_000, 115_000  # chips shut themselves off at 105 to 125 °C: none answers beyond
LEAST_MC = 1_000  # a smaller number is no thousandths of a degree: whole degrees, or parked
COOLEST_C, WARMEST_C = 10, 95  # of a zone that tells whole degrees
SPREAD_MC = 50_000  # on one chip, two places never differ by more
PROCESSOR, CHIP, UNNAMED, ELSEWHERE = range(4)
# Qualcomm shows the battery's charge in per cent, and voltages and currents in mV and mA, as zones: all below 10 °C.
CHARGE, CHARGE_MC = r"^soc$|^vbat|^ibat|^vph|bcl|[-_]lvl\d", 10_000
# The first pattern that a zone's name contains decides what it is near. Sources: the device trees of MediaTek,
# Qualcomm, Tensor, Exynos, Rockchip, Allwinner, Broadcom and Tegra, and the names of hwmon chips.
PLACES = (
    (PROCESSOR, r"cpu|x86_pkg_temp|coretemp|k10temp|zenpower|package|^(big|mid|little)\b|cluster|apc\d"),
    (
        ELSEWHERE,
        r"bat|bms|charg|chg|usb|wi-?fi|wlan|wmt|modem|mdm|\bmd\d|skin|shell|board|bts|pmic|\bpm\w*\d|ntc|xo[-_]",
    ),
    (ELSEWHERE, r"flash|lcd|disp|nvme|ssd|drive|fan|therm-adc|quiet|case|ambient|iwl|buck|abb|conn|eth|phy|tspa|tsap"),
    (CHIP, r"soc|tsens|^mtkts\d|aoss|gpu|g3d|npu|tpu|isp|imx|bcm2|sunxi|rockchip|core|\b(ap|ao|pll|tj)\b"),
)


class Zone(NamedTuple):
    """One sensor: its name, the whole number that it tells, or why it tells none."""

    name: str
    told: int | None
    why: str = ""


class Belief(NamedTuple):
    """The processor's temperature in m°C (None: none is believed), whose it is, and why others are not believed."""

    mc: int | None
    why: str
    doubts: list[str]


def read_temperature() -> int | None:
    """Read the temperature of the processor's hottest believed sensor, in thousandths of a degree Celsius."""
    return read_belief().mc


def read_belief() -> Belief:
    """Read every thermal zone, or psutil's sensors where none is believed, and decide which to believe."""
    belief = judge_zones(read_zones())
    if belief.mc is not None:
        return belief
    sensors = query_psutil(lambda ps: ps.sensors_temperatures()) or {}
    others = [
        Zone(f"{chip} {one.label}".strip(), round(one.current * 1000)) for chip, part in sensors.items() for one in part
    ]
    second = judge_zones(others)
    return second._replace(doubts=belief.doubts + second.doubts) if others else belief


def read_zones() -> list[Zone]:
    """Read the kernel's thermal zones."""
    zones = []
    for path in find_paths("/sys/class/thermal/thermal_zone*/temp"):
        folder = path[: -len("/temp")]
        name, text = read_text(f"{folder}/type") or folder.rpartition("/")[2], read_text(path)
        sound = re.fullmatch(r"-?\d{1,9}", text, re.ASCII)
        why = explain_refusal(path) if not text else f"tells {text[:20]!r}"
        zones.append(Zone(name, int(text) if sound else None, "" if sound else why or "tells nothing"))
    return zones


def find_place(name: str) -> int:
    """Return what a zone is near, by its name."""
    return next((place for place, pattern in PLACES if re.search(pattern, name, re.IGNORECASE)), UNNAMED)


def judge_zones(zones: list[Zone]) -> Belief:
    """Decide which zones to believe; the hottest of the processor's counts, else of the chip's, else of the others'."""
    sound: list[Zone] = []
    small: list[Zone] = []
    doubts: list[str] = []
    for zone in zones:
        if zone.told is None:
            doubts.append(f"{zone.name}: {zone.why}")
        elif re.search(CHARGE, zone.name, re.IGNORECASE) and abs(zone.told) < CHARGE_MC:
            doubts.append(f"{zone.name} tells {zone.told}: the battery's charge, voltage or current")
        elif abs(zone.told) < LEAST_MC:
            small.append(zone)
        elif COLDEST_MC <= zone.told <= HOTTEST_MC:
            sound.append(zone)
        else:
            doubts.append(f"{zone.name} tells {show(zone.told)}: no chip that answers has this, nothing is wired to it")
    whole = find_whole_degrees(small, sound)
    doubts += [f"{zone.name} tells {zone.told}: no temperature in m°C or °C" for zone in small if zone not in whole]
    sound += [Zone(zone.name, (zone.told or 0) * 1000) for zone in whole]
    on_chip = [zone for zone in sound if find_place(zone.name) in {PROCESSOR, CHIP}]
    agreed = find_agreeing(on_chip)
    doubts += [
        f"{zone.name} tells {show(zone.told)}: too far from the chip's other zones"
        for zone in on_chip
        if zone not in agreed
    ]
    if on_chip and not agreed:
        return Belief(None, "the chip's zones contradict each other", doubts)
    for place in (PROCESSOR, CHIP, UNNAMED, ELSEWHERE):
        chosen = [zone for zone in agreed or sound if find_place(zone.name) == place]
        if chosen:
            hottest = max(chosen, key=lambda zone: zone.told or 0)
            others = f", the hottest of {len(chosen)}" if len(chosen) > 1 else ""
            unsure = "; no zone is named after the processor" if place == ELSEWHERE else ""
            degrees = ", told in whole degrees" if hottest.name in {zone.name for zone in whole} else ""
            return Belief(hottest.told, f"{hottest.name}{others}{degrees}{unsure}", doubts)
    return Belief(None, "no temperature is believed" if doubts else "the device reports no temperature", doubts)


def find_whole_degrees(small: list[Zone], sound: list[Zone]) -> list[Zone]:
    """Return the zones that tell whole degrees: only where no zone of the chip tells thousandths, and others agree."""
    if any(find_place(zone.name) in {PROCESSOR, CHIP} for zone in sound):
        return []
    fits = [zone for zone in small if COOLEST_C <= (zone.told or 0) <= WARMEST_C]
    return [
        zone
        for zone in fits
        if not sound or any(abs((zone.told or 0) * 1000 - (one.told or 0)) <= SPREAD_MC for one in sound)
    ]


def find_agreeing(zones: list[Zone]) -> list[Zone]:
    """Return the largest group of zones that one chip can have at once; empty if two such groups are as good.

    Of equal groups, the one with more zones of the processor counts, then the one with fewer round numbers, which
    parked zones tell.
    """
    ordered = sorted(zones, key=lambda zone: zone.told or 0)
    groups = [[zone for zone in ordered if 0 <= (zone.told or 0) - (first.told or 0) <= SPREAD_MC] for first in ordered]
    marks = [(len(group), count_processors(group), -count_round(group)) for group in groups]
    best = [group for group, mark in zip(groups, marks) if mark == max(marks)]  # noqa: B905 - Python 3.9
    apart = len(best) > 1 and not set(best[0]) & set(best[-1])
    return [] if not best or apart else best[0]


def count_processors(zones: list[Zone]) -> int:
    """Count the zones that are named after the processor."""
    return sum(find_place(zone.name) == PROCESSOR for zone in zones)


def count_round(zones: list[Zone]) -> int:
    """Count the zones that tell whole degrees, as a parked one does and a quiet one seldom."""
    return sum((zone.told or 0) % 1000 == 0 for zone in zones)


def show(told: int | None) -> str:
    """Return a zone's number as degrees."""
    return f"{(told or 0) / 1000:.1f} °C"
