"""What `rankship doctor` prints of a battery's gauge and a temperature: what is believed, and why."""

import sys
from pathlib import Path

import pytest

from rankship_targets.verbs.devices import doctor

MILLIAMPS = "the gauge tells milliamps: 350 µA at 4.0 V would be 0.0014 W, below what any phone draws"


def put(root: Path, folder: str, **values: object) -> None:
    (root / "sys/class" / folder).mkdir(parents=True)
    for name, value in values.items():
        (root / "sys/class" / folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("more", "said"), [("", MILLIAMPS), ('current_unit = "uA"', "current_now is in µA, says the inventory: 0.0014 W")]
)
def test_the_doctor_says_what_it_believes_and_why(
    more: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, inventory = tmp_path / "root", tmp_path / "devices.toml"
    put(root, "power_supply/battery", type="Battery", status="Discharging", current_now=-350, voltage_now=4_012_000)
    put(root, "thermal/thermal_zone0", type="mtktscpu", temp=41_200)
    put(root, "thermal/thermal_zone1", type="mtkts_bts1", temp=125_000)
    monkeypatch.setenv("RANKSHIP_AGENT_ROOT", str(root))
    monkeypatch.setenv("COLUMNS", "200")
    here = f'transport = "local"\npython = "{sys.executable}"\nworkdir = "{tmp_path / "work"}"\n'
    inventory.write_text(f'[phone]\n{here}[phone.meter]\nname = "battery"\n{more}\n')
    assert doctor(["phone", "--inventory", str(inventory)]) in {0, 4}
    printed = capsys.readouterr().out
    assert said in printed
    assert "onnx cpu; tflite xnnpack, plain; executorch xnnpack, plain" in printed
    assert "41.2 °C by mtktscpu; not believed: mtkts_bts1 tells 125.0 °C" in printed
