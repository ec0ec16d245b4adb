"""The kernel's power sensors: several channels, a reversed sign, sensors that refuse, and names that clash."""

from pathlib import Path

import pytest

from rankship_targets.agent import hwmon, system

INA3221 = {"name": "ina3221", "in1_input": 5_000, "in2_input": 3_300, "in3_input": 1_800, "in7_input": 40}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    return tmp_path


def put_chip(root: Path, number: int, **values: object) -> Path:
    folder = root / f"sys/class/hwmon/hwmon{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(f"{value}\n")
    return folder


def names(offer: dict[str, list[dict[str, str]]]) -> list[str]:
    return [channel["name"] for channel in offer["channels"]]


def test_every_channel_of_current_and_voltage_is_offered(root: Path) -> None:
    put_chip(root, 0, **INA3221, curr1_input=600, curr2_input=100, curr3_input=50, curr4_input=750)
    gauge = hwmon.find_hwmon()
    assert names(gauge.offer) == [f"ina3221@hwmon0:curr{n}*in{n}" for n in (1, 2, 3)]
    assert [row[2] for row in gauge.read()] == [3_000_000, 330_000, 90_000]


def test_a_reversed_shunt_is_undone_and_told(root: Path) -> None:
    put_chip(root, 0, name="ina219", curr1_input=-600, in1_input=5_000)
    gauge = hwmon.find_hwmon()
    assert gauge.read()[0][2] == 3_000_000
    assert gauge.offer["notes"] == ["ina219@hwmon0:curr1*in1 tells a reversed sign, which is undone"]


def test_a_sensor_that_refuses_is_told_and_the_others_are_offered(root: Path) -> None:
    folder = put_chip(root, 0, name="ina226", power1_input=3_000_000)
    (folder / "power2_input").symlink_to("/proc/self/mem")
    offer = hwmon.find_hwmon().offer
    assert names(offer) == ["ina226@hwmon0:power1"]
    assert offer["notes"] == ["ina226@hwmon0:power2 refuses to be read: Input/output error"]
    (folder / "power1_input").unlink()
    assert "power2 refuses to be read: Input/output error" in hwmon.find_hwmon().offer["problem"]


def test_a_power_that_refuses_leaves_current_and_voltage(root: Path) -> None:
    folder = put_chip(root, 0, name="ina226", curr1_input=600, in1_input=5_000)
    (folder / "power1_input").symlink_to("/proc/self/mem")
    assert names(hwmon.find_hwmon().offer) == ["ina226@hwmon0:curr1*in1"]


def test_channels_of_one_name_are_told_apart(root: Path) -> None:
    powers = {f"power{n}_{what}": told for n in (1, 2) for what, told in (("input", n * 10**6), ("label", "VDD"))}
    put_chip(root, 0, name="pmbus", **powers)
    gauge = hwmon.find_hwmon()
    assert names(gauge.offer) == ["pmbus@hwmon0:VDD#1", "pmbus@hwmon0:VDD#2"]
    assert [row[2] for row in gauge.read()] == [1_000_000, 2_000_000]


def test_current_and_voltage_of_different_rails_are_not_multiplied(root: Path) -> None:
    labels = {"curr1_label": "iin", "in1_label": "vin", "curr2_label": "iout1", "in2_label": "vcap"}
    put_chip(root, 0, name="pmbus", curr1_input=600, in1_input=12_000, curr2_input=900, in2_input=5_000, **labels)
    assert names(hwmon.find_hwmon().offer) == ["pmbus@hwmon0:iin"]


@pytest.mark.parametrize(
    ("told", "why"),
    [(5_000_000_000, "is not believed: 5,000 W is no board's power"), (0, "tells 0 W: nothing may be wired to it")],
)
def test_a_power_that_no_board_has_is_told(told: int, why: str, root: Path) -> None:
    put_chip(root, 0, name="ina226", power1_input=told)
    offer = hwmon.find_hwmon().offer
    assert why in " ".join([*offer["notes"], offer["problem"] or ""])
    assert bool(offer["channels"]) == (told == 0)


def test_a_batterys_own_chip_is_no_sensor(root: Path) -> None:
    folder = put_chip(root, 0, name="BAT0", power1_input=9_000_000)
    (folder / "device").mkdir()
    (folder / "device/type").write_text("Battery\n")
    assert hwmon.find_hwmon().offer["channels"] == []
