"""The inventory: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_targets.client.connect import TRANSPORTS, open_transport
from rankship_targets.devices.device import find_device, inventory_path, load_inventory
from rankship_targets.verbs.devices import devices

SSH = """
[pi4]
transport = "ssh"
host = "pi4.local"
user = "pi"
host_key = "ssh-ed25519 AAAA"
"""


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKSHIP_DEVICES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, text: str) -> Path:
    path = folder / "devices.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_inventory(write(folder, text))
    return f"{caught.value} → {caught.value.hint}"


def test_this_machine_is_always_there(tmp_path: Path) -> None:
    device = find_device("this-machine")
    assert device.transport == "local"
    assert Path(device.workdir) == tmp_path / "cache/rankship/device"
    assert Path(device.python).is_absolute()


def test_relative_xdg_folders_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert Path(find_device("this-machine").workdir) == Path.home() / ".cache/rankship/device"


def test_inventory_is_found_in_the_users_configuration(tmp_path: Path) -> None:
    write(tmp_path / "config/rankship", SSH)
    device = find_device("pi4")
    assert (device.host, device.port, device.python) == ("pi4.local", 22, "python3")


def test_environment_names_the_inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSHIP_DEVICES", str(write(tmp_path, SSH)))
    assert inventory_path() == tmp_path / "devices.toml"
    assert list(load_inventory()) == ["this-machine", "pi4"]
    monkeypatch.setenv("RANKSHIP_DEVICES", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="cannot read"):
        load_inventory()


def test_unknown_device_names_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_device("pi5", write(tmp_path, SSH))
    assert "did you mean 'pi4'? known devices: pi4, this-machine" in caught.value.hint


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    said = complaint(tmp_path, SSH + 'hostkey = "x"\n')
    assert "[pi4]" in said
    assert "unknown key 'hostkey', did you mean 'host_key'?" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SSH.replace('host_key = "ssh-ed25519 AAAA"', ""), "ssh-keyscan -t ed25519 pi4.local"),
        (SSH.replace("ssh-ed25519 AAAA", "AAAA"), "not of the form"),
        (SSH.replace('user = "pi"', ""), "needs 'user'"),
        (SSH.replace('host = "pi4.local"', ""), "needs 'host'"),
        (SSH + 'workdir = "~/rankship"', "relative to the home directory"),
        (SSH + 'workdir = ""', "relative to the home directory"),
        (SSH + "port = 'many'", "port"),
        (SSH + "name = 'other'", "heading is the name"),
        (SSH.replace('"ssh"', '"telnet"'), "transport"),
        ("[this-machine]\ntransport = 'local'", "built in"),
        (SSH + "[pi4.meter]\nname = 'amps'", "meter.name"),
        (SSH + "[pi4.meter]\nname = 'hwmon'\nrail = 'x'", "unknown key"),
        (SSH + "[pi4.meter]\nname = 'bench'\nfile = 'x'", "has a clock of its own"),
        (SSH + "[pi4.meter]\nname = 'replay'", "'replay' needs `file`"),
        (SSH + "[pi4.meter]\nname = 'hwmon'\nperiod_us = 9", "out of range"),
        (SSH + "[pi4.meter]\nname = 'hwmon'\nrails = ['a', 'a']", "names a rail twice"),
        ("pi4 = 3", "stands above every heading"),
        ("[pi4", "devices.toml"),
    ],
)
def test_wrong_inventories_are_refused_with_advice(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_inventory_that_everyone_may_write_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, SSH)
    path.chmod(0o666)
    with pytest.raises(InputError, match="writable by everyone"):
        load_inventory(path)


def test_a_meters_file_lies_beside_the_inventory(tmp_path: Path) -> None:
    path = write(tmp_path, SSH + "[pi4.meter]\nname = 'replay'\nfile = 'known.json'")
    meter = load_inventory(path)["pi4"].meter
    assert meter is not None
    assert meter.file == str(tmp_path / "known.json")


def test_shipped_example_is_read_and_its_placeholder_key_is_refused_later() -> None:
    example = Path(__file__).parents[4] / "targets/devices/example.toml"
    assert load_inventory(example)["pi4"].label.startswith("Raspberry Pi 4")


def test_every_transport_of_the_table_can_be_imported() -> None:
    with open_transport(find_device("this-machine")) as transport:
        assert transport.run(["true"], timeout_s=30).code == 0
    assert set(TRANSPORTS) == {"local", "ssh", "adb"}


def test_devices_verb_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices(["--inventory", str(write(tmp_path, SSH))]) == 0
    printed = capsys.readouterr().out
    assert "this-machine" in printed
    assert "pi@pi4.local:22" in printed
