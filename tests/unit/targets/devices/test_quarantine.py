"""Quarantine: three failures in a row close a device, an answer opens it, and the evidence is shown."""

import shlex
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import (
    BuildError,
    ConnectionLost,
    InputError,
    Lacks,
    Quarantined,
    RankshipError,
    TargetBusy,
    TargetTimeout,
)
from rankship_targets.devices.device import Device
from rankship_targets.devices.inventory import add_device
from rankship_targets.devices.quarantine import clear, read_troubles, watching
from rankship_targets.verbs.devices import doctor

DEVICE = Device(name="pi 4 '../x'", transport="ssh", host="pi4.local", user="pi", host_key="k")


def fail(device: Device, error: RankshipError) -> None:
    with pytest.raises(type(error)), watching(device):
        raise error


def test_three_failures_in_a_row_close_the_device_with_the_evidence() -> None:
    for number in range(3):
        fail(DEVICE, ConnectionLost(f"failure {number}", hint="see"))
    with pytest.raises(Quarantined) as caught, watching(DEVICE):
        pytest.fail("a device in quarantine was used")
    assert all(f"ConnectionLost: failure {number}" in str(caught.value) for number in range(3))
    assert f"rankship doctor {shlex.quote(DEVICE.name)}" in caught.value.hint
    fail(DEVICE, Quarantined("again", hint=""))  # refused before anything runs, and counted no further
    clear(DEVICE)
    with watching(DEVICE):
        pass


def test_success_forgets_what_failed_before() -> None:
    for _ in range(2):
        fail(DEVICE, TargetTimeout("slow", hint=""))
    with watching(DEVICE):
        pass
    assert read_troubles(DEVICE) is None


@pytest.mark.parametrize("error", [TargetBusy, Lacks, InputError, BuildError])
def test_what_is_not_the_devices_own_failure_changes_nothing(error: type[RankshipError]) -> None:
    fail(DEVICE, TargetTimeout("slow", hint=""))
    for _ in range(4):
        fail(DEVICE, error("not its own", hint=""))
    troubles = read_troubles(DEVICE)
    assert troubles is not None
    assert [one.message for one in troubles.failures] == ["slow"]


def test_an_interruption_changes_nothing() -> None:
    fail(DEVICE, TargetTimeout("slow", hint=""))
    with pytest.raises(KeyboardInterrupt), watching(DEVICE):
        raise KeyboardInterrupt
    assert read_troubles(DEVICE) is not None


def test_another_address_or_another_device_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    fail(DEVICE, TargetTimeout("slow", hint=""))
    assert read_troubles(replace(DEVICE, host="pi4.lan")) is None
    assert read_troubles(replace(DEVICE, name="pi5")) is None
    (file,) = tmp_path.rglob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("{half")
    assert read_troubles(DEVICE) is None


def test_the_doctor_clears_a_device_that_answers_and_only_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = tmp_path / "devices.toml"
    add_device(inventory, "here", {"transport": "local", "python": sys.executable, "workdir": str(tmp_path / "here")})
    add_device(inventory, "gone", {"transport": "local", "python": "no-such-python", "workdir": str(tmp_path / "gone")})
    for name in ("here", "gone"):
        device = Device(name=name, transport="local")
        for _ in range(3):
            fail(device, ConnectionLost("lost", hint=""))
        doctor([name, "--inventory", str(inventory)])
        assert "failed 3 times" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert read_troubles(Device(name="here", transport="local")) is None
    assert read_troubles(Device(name="gone", transport="local")) is not None
