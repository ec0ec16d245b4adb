"""Which temperature is believed: zones as devices are known to show them, parked, refused and in other units."""

import os
from pathlib import Path

import pytest

from rankship_targets.agent import state, system
from rankship_targets.agent.thermal import Zone, judge_zones, read_belief

TABLET = [Zone("mtktscpu", 41_200), Zone("mtktsbattery", 33_000)]
PHONE = [Zone("cpu-0-0-usr", 44_700), Zone("cpu-1-0-usr", 47_200), Zone("gpuss-0", 43_100), Zone("battery", 31_000)]


@pytest.mark.parametrize(
    "parked",
    [
        *(Zone("mtkts_bts1", told) for told in (125_000, 127_000, -127_000, -274_000, -40_000, 0)),
        *(Zone("soc", told) for told in (100, 81, 41, 1, 0)),
        *(Zone("soc-thermal", told) for told in (125_000, 100_000, 100, 0, -127_000)),
        *(Zone("mtktspmic", told) for told in (85_000, 100_000, 150_000)),
        Zone("PMIC-Die", 100_000),
        Zone("vbat-lvl0", 4_012),
        Zone("ibat-high", 1_200),
        Zone("cpu3-thermal", 125_000),
        Zone("cpu3-thermal", 100_000),
        Zone("cpu3-thermal", None, "Resource temporarily unavailable"),
    ],
)
def test_a_zone_that_measures_nothing_changes_nothing(parked: Zone) -> None:
    for zones, expected in ((TABLET, 41_200), (PHONE, 47_200)):
        assert judge_zones([*zones, parked]).mc == expected
        assert judge_zones([parked, *zones]).mc == expected


@pytest.mark.parametrize(
    ("zones", "expected", "of"),
    [
        ([Zone("thermal_zone0", 48_212), Zone("thermal_zone1", 31_000)], 48_212, "thermal_zone0, the hottest of 2"),
        ([Zone("cpu-thermal", 84_000), Zone("battery", 33_000)], 84_000, "cpu-thermal"),
        ([Zone("acpitz", 27_800), Zone("x86_pkg_temp", 62_000)], 62_000, "x86_pkg_temp"),
        ([Zone("nvme Composite", 70_000), Zone("coretemp Core 0", 51_000)], 51_000, "coretemp Core 0"),
        (
            [Zone("tsens_tz_sensor0", 45), Zone("tsens_tz_sensor5", 48), Zone("bms", 33_000)],
            48_000,
            "whole degrees",
        ),
        ([Zone("cpu-thermal", 47)], 47_000, "whole degrees"),
        ([Zone("battery", 33_000), Zone("soc", 81)], 33_000, "no zone is named after the processor"),
        ([Zone("BIG", 61_000), Zone("MID", 58_000), Zone("LITTLE", 52_000), Zone("skin", 39_000)], 61_000, "BIG"),
    ],
)
def test_the_processors_own_zone_is_preferred(zones: list[Zone], expected: int, of: str) -> None:
    belief = judge_zones(zones)
    assert belief.mc == expected
    assert of in belief.why


@pytest.mark.parametrize(
    ("zones", "why"),
    [
        ([], "the device reports no temperature"),
        ([Zone("cpu-thermal", 125_000)], "no temperature is believed"),
        ([Zone("cpu-thermal", 0), Zone("gpu-thermal", -127_000)], "no temperature is believed"),
        ([Zone("cpu0", 41_000), Zone("cpu1", 100_000)], "contradict each other"),
        ([Zone("soc", 100)], "no temperature is believed"),
        ([Zone("cpu-thermal", None, "Input/output error")], "no temperature is believed"),
    ],
)
def test_what_cannot_be_explained_is_not_measured(zones: list[Zone], why: str) -> None:
    belief = judge_zones(zones)
    assert belief.mc is None
    assert why in belief.why
    assert len(belief.doubts) >= min(1, len(zones))


def test_every_zone_that_is_not_believed_is_named_with_the_reason() -> None:
    belief = judge_zones([*TABLET, Zone("bts", 125_000), Zone("soc", 100), Zone("cpu9", None, "Permission denied")])
    assert belief.doubts == [
        "bts tells 125.0 °C: no chip that answers has this, nothing is wired to it",
        "soc tells 100: the battery's charge, voltage or current",
        "cpu9: Permission denied",
    ]


def put_zone(root: Path, number: int, name: str, told: str) -> Path:
    folder = root / f"sys/class/thermal/thermal_zone{number}"
    folder.mkdir(parents=True)
    (folder / "type").write_text(f"{name}\n")
    (folder / "temp").write_text(f"{told}\n")
    return folder / "temp"


def test_a_zone_that_refuses_or_hangs_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    put_zone(tmp_path, 0, "cpu-thermal", "41200")
    broken = put_zone(tmp_path, 1, "cpu-broken", "")
    broken.unlink()
    broken.symlink_to("/proc/self/mem")  # reading it is an I/O error
    hung = put_zone(tmp_path, 2, "cpu-hung", "")
    hung.unlink()
    os.mkfifo(hung)
    put_zone(tmp_path, 3, "cpu-odd", "N/A")
    belief = read_belief()
    assert belief.mc == 41_200
    assert belief.doubts == ["cpu-broken: Input/output error", "cpu-hung: tells nothing", "cpu-odd: tells 'N/A'"]


def test_a_sensor_that_is_not_ready_is_asked_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    put_zone(tmp_path, 0, "cpu-thermal", "41200")
    asked: list[int] = []
    really_read = os.read

    def read(descriptor: int, size: int) -> bytes:
        asked.append(size)
        if len(asked) == 1:
            raise BlockingIOError
        return really_read(descriptor, size)

    monkeypatch.setattr(os, "read", read)
    assert system.read_text("/sys/class/thermal/thermal_zone0/temp") == "41200"


@pytest.mark.parametrize(
    ("told", "khz"),
    [
        ("1500000", 1_500_000),
        ("1500000000", 1_500_000),  # Hz
        ("1500", 1_500_000),  # MHz
        ("300000", 300_000),
        ("0", None),
        ("<unknown>", None),
        ("15000", None),
        ("-1", None),
        ("99999999999999", None),
    ],
)
def test_a_clock_is_read_in_the_unit_in_which_it_can_be_true(
    told: str, khz: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_cur_freq").write_text(told)
    assert state.read_clocks() == (None if khz is None else [khz])


def test_odd_texts_of_load_and_battery_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/loadavg").write_text("-nan 0.1 0.1 1/2 3")
    battery = tmp_path / "sys/class/power_supply/battery"
    battery.mkdir(parents=True)
    (battery / "type").write_text("Battery")
    (battery / "capacity").write_text("255")
    told = state.read_state()
    assert (told["load_1m_milli"], told["battery_percent"], told["temperature_mc"]) == (None, None, None)
