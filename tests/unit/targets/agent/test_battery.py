"""In which units a battery's gauge is believed, and when it is not believed at all."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_targets.agent import battery, system
from rankship_targets.agent.battery import FACTS, Facts, judge
from rankship_targets.devices.device import load_inventory

ABI = {"current_now": -350_000, "voltage_now": 4_012_000}


def facts(**told: int) -> Facts:
    return {**dict.fromkeys(FACTS), **told}


@pytest.mark.parametrize(
    ("told", "current", "voltage"),
    [
        (ABI, 1, 1),
        ({**ABI, "current_now": 350_000}, 1, 1),
        ({**ABI, "current_now": -350}, 1000, 1),
        ({**ABI, "current_now": 350}, 1000, 1),
        ({"current_now": -350, "voltage_now": 4_012}, 1000, 1000),
        ({"current_now": -350_000, "voltage_now": 4_012}, 1, 1000),
        ({"current_now": -3_100, "voltage_now": 3_700_000}, 1000, 1),
        ({"current_now": 2_000_000, "voltage_now": 15_400_000}, 1, 1),  # four cells of a laptop: 31 W
        # 0.08 W is little: what the charge or the power is told in decides
        ({**ABI, "current_now": -20_000, "charge_full": 4_410_000}, 1, 1),
        ({**ABI, "current_now": -20_000, "power_now": 80_000}, 1, 1),
        ({**ABI, "current_now": -15, "charge_full": 4_410}, 1000, 1),
        # a driver that tells mA may tell its charge in µAh all the same
        ({**ABI, "current_now": -350, "charge_full": 4_410_000}, 1000, 1),
    ],
)
def test_a_gauge_is_believed_in_the_units_in_which_it_can_be_true(
    told: dict[str, int], current: int, voltage: int
) -> None:
    belief = judge(facts(**told), {})
    assert (belief.current, belief.voltage, belief.problem) == (current, voltage, "")
    assert belief.notes


def test_the_reason_is_one_line_of_physics() -> None:
    assert judge(facts(**{**ABI, "current_now": -350}), {}).notes == [
        "the gauge tells milliamps: 350 µA at 4.0 V would be 0.0014 W, below what any phone draws"
    ]
    assert judge(facts(**ABI), {}).notes == ["the gauge tells microamps, 1.4 W: 350000 mA at 4.0 V would be 1,404 W"]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({**ABI, "current_now": -12_000}, "as mA 48 W; expected 0.1 to 25 W"),
        ({**ABI, "current_now": 0}, "0 µA at 4.0 V"),
        ({**ABI, "current_now": -1}, 'add current_unit = "mA"'),
        ({**ABI, "voltage_now": 0}, "neither µV nor mV"),
        ({**ABI, "voltage_now": 4}, 'add voltage_unit = "mV"'),
        ({**ABI, "voltage_now": -4_000_000}, "neither µV nor mV"),
    ],
)
def test_what_is_plausible_in_no_unit_is_not_measured(told: dict[str, int], why: str) -> None:
    belief = judge(facts(**told), {})
    assert None in {belief.current, belief.voltage}
    assert why in belief.problem


def test_the_inventorys_word_comes_before_every_guess() -> None:
    belief = judge(facts(**ABI), {"current_unit": "mA", "voltage_unit": "uV"})
    assert (belief.current, belief.voltage, belief.problem) == (1000, 1, "")
    assert any("says the inventory" in note for note in belief.notes)


@pytest.mark.parametrize(
    ("told", "charge"),
    [
        ({"charge_counter": 3_000_000}, 1),
        ({"charge_counter": 3_000}, 1000),
        ({"charge_counter": 350_000, "capacity": 8}, 1),
        ({"charge_counter": 350, "capacity": 8}, 1000),
        ({"charge_counter": 20_000, "charge_full": 4_400_000}, 1),
        ({"charge_counter": 7}, None),
        ({"charge_counter": -3_000_000, "capacity": 80}, None),
        ({}, None),
    ],
)
def test_the_charge_is_believed_in_the_unit_of_a_battery(told: dict[str, int], charge: int | None) -> None:
    assert judge(facts(**ABI, **told), {}).charge == charge


@given(st.dictionaries(st.sampled_from(FACTS), st.integers(-(2**63), 2**63)))
def test_any_numbers_give_a_power_that_a_device_can_draw_or_a_reason(told: dict[str, int]) -> None:
    told = {**ABI, **told}
    belief = judge(facts(**told), {})
    if belief.voltage and belief.current:
        watts = abs(told["current_now"]) * belief.current / 1e6 * told["voltage_now"] * belief.voltage / 1e6
        assert 0.005 <= watts <= 25 * 3 * 8
    else:
        assert belief.problem


def put_supply(root: Path, name: str, **values: object) -> None:
    folder = root / f"sys/class/power_supply/{name}"
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in {"type": "Battery", "status": "Discharging", **ABI, **values}.items():
        (folder / key).write_text(f"{value}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    return tmp_path


def test_power_and_charge_are_read_in_the_units_believed(root: Path) -> None:
    put_supply(root, "battery", current_now=-350, charge_counter=3_000)
    gauge = battery.find_battery()
    assert gauge.offer["problem"] is None
    assert [row[2] for row in gauge.read()] == [1_404_200, 0]
    put_supply(root, "battery", current_now=-350, charge_counter=2_999)
    assert gauge.read()[1][2] == 1_000 * 3600 * 4_012_000 // 1_000_000
    put_supply(root, "battery", current_now=-350_000, charge_counter=2_999)
    assert gauge.read()[0][2] is None, "no battery gives 1,404 W"


def test_a_mouses_battery_is_not_the_devices(root: Path) -> None:
    put_supply(root, "hidpp_battery_0", scope="Device")
    assert "no battery reports" in battery.find_battery().offer["problem"]
    put_supply(root, "battery")
    assert [channel["name"] for channel in battery.find_battery().offer["channels"]] == ["battery:current*voltage"]


def test_two_gauges_of_one_battery_are_told(root: Path) -> None:
    put_supply(root, "battery", current_now=-350)
    put_supply(root, "maxfg", current_now=352_000)
    offer = battery.find_battery().offer
    assert len(offer["channels"]) == 2
    assert "battery and maxfg tell nearly the same current: name one of them as rails, not both" in offer["notes"]


def test_a_gauge_that_refuses_is_named_with_the_reason(root: Path) -> None:
    put_supply(root, "battery")
    current = root / "sys/class/power_supply/battery/current_now"
    current.unlink()
    current.symlink_to("/proc/self/mem")
    assert battery.find_battery().offer["problem"] == "battery: current_now refuses to be read: Input/output error"


def test_units_stand_in_the_inventory(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text('[phone]\ntransport = "local"\n[phone.meter]\nname = "battery"\ncurrent_unit = "mA"\n')
    meter = load_inventory(path)["phone"].meter
    assert meter
    assert meter.current_unit == "mA"
