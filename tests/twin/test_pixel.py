"""The emulated phone: what it must be like for tests over it to mean something, and that it leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rankship_pipeline.foundation.errors import InputError, TargetBusy
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.client.connect import open_transport
from rankship_targets.devices.device import Device
from rankship_targets.transport.adb.connection import AdbTransport, open_adb
from rankship_targets.transport.copying import copy_verified
from rankship_targets.transport.lease import Lease, describe_owner
from rankship_targets.transport.protocol import hash_remote, run_checked
from rankship_targets.twin import android
from rankship_targets.twin import pixel as pixel_room
from rankship_targets.twin.pixel import Phone, start_pixel

pytestmark = pytest.mark.twin
PROGRAM = """
import json, os, sys
from rankship_targets.devices.device import Device
from rankship_targets.twin.pixel import launch_phone
from rankship_targets.transport.adb.connection import open_adb
from rankship_targets.twin.pixel import reach
phone = launch_phone()
with open_adb(reach(phone, Device(name="phone", transport="adb", serial="-"))) as transport:
    assert transport.run(["true"], timeout_s=60).code == 0
print(json.dumps([phone.process.pid, str(phone.folder)]), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def transport(pixel: Device) -> AdbTransport:
    return open_adb(pixel)


def read(transport: AdbTransport, *argv: str) -> str:
    return run_checked(transport, argv, timeout_s=60).strip()


def test_it_runs_aarch64_programs_as_androids_shell_user(transport: AdbTransport) -> None:
    assert read(transport, "uname", "-m") == "aarch64"
    assert read(transport, "id", "-u") == "2000"
    assert "android13" in read(transport, "uname", "-r")
    assert read(transport, "getprop", "ro.product.model") == "Pixel 6"


def test_it_has_the_processor_of_a_pixel_and_not_the_hosts(transport: AdbTransport) -> None:
    text = read(transport, "cat", "/proc/cpuinfo")
    assert text.count("CPU part") == 8
    assert "asimddp" in text
    assert "sve" not in text
    assert read(transport, "cat", "/sys/devices/system/cpu/present") == "0-7"


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="no aarch64-linux-gnu-gcc")
def test_a_program_that_needs_a_c_library_fails_as_on_a_phone(transport: AdbTransport, tmp_path: Path) -> None:
    source = tmp_path / "hello.c"
    source.write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 3; }\n')
    for name, flags in (("dynamic", []), ("static", ["-static"])):
        command = ["aarch64-linux-gnu-gcc", *flags, "-o", str(tmp_path / name), str(source)]
        subprocess.run(command, check=True)
        copy_verified(transport, tmp_path / name, name, hash_file(tmp_path / name))
        assert transport.run(["chmod", "755", name], timeout_s=60).code == 0
    done = transport.run(["./static"], timeout_s=60)
    assert (done.code, done.stdout) == (3, "hello\n")
    assert transport.run(["./dynamic"], timeout_s=60).code != 0
    assert transport.run(["./dynamic"], timeout_s=60).stdout == ""


def test_its_condition_may_change_while_it_runs(start_phone: Callable[..., Phone]) -> None:
    phone = start_phone()
    device = pixel_room.reach(phone, Device(name="phone", transport="adb", serial="-"))
    with open_adb(device) as transport:
        zone = "/sys/class/thermal/thermal_zone0/temp"
        assert read(transport, "cat", zone) == "41200"
        (phone.folder / "condition" / zone.removeprefix("/")).write_text("85000\n")
        assert read(transport, "cat", zone) == "85000"


def test_its_services_tell_the_battery_and_the_temperatures(transport: AdbTransport) -> None:
    assert "level: 87" in read(transport, "dumpsys", "battery")
    assert "Thermal Status: 0" in read(transport, "dumpsys", "thermalservice")
    assert transport.run(["dumpsys", "absent"], timeout_s=60).code == 1


def test_everything_that_a_session_calls_is_there(transport: AdbTransport, pixel: Device, tmp_path: Path) -> None:
    """A lease is taken, renewed, read by another and given back; a file is copied and proven."""
    folder = "session/lease"
    run_checked(transport, ["mkdir", "-p", "--", "session"])
    mine, other = (Lease(device=pixel, folder=folder, owner=describe_owner()) for _ in range(2))
    mine.take(transport)
    mine.renew(transport)
    with pytest.raises(TargetBusy):
        other.take(transport)
    mine.release(transport)
    other.take(transport)
    other.release(transport)
    assert transport.run(["ls", "--", folder], timeout_s=60).code != 0
    (tmp_path / "file").write_bytes(b"content")
    sha256 = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert copy_verified(transport, tmp_path / "file", "session/file", sha256)
    assert hash_remote(transport, "session/file") == sha256


# Starting and ending


def test_what_is_written_lasts_where_a_storage_is_named(tmp_path: Path, start_phone: Callable[..., Phone]) -> None:
    del start_phone  # it skips where a phone cannot be started
    for command in ("echo kept > file", "cat file"):
        phone = pixel_room.launch_phone(storage=tmp_path / "storage")
        with open_adb(pixel_room.reach(phone, Device(name="phone", transport="adb"))) as transport:
            done = transport.run(["sh", "-c", command], timeout_s=60)
        phone.stop()
    assert (done.code, done.stdout) == (0, "kept\n")


def test_a_device_that_is_a_twin_is_started_once(
    start_phone: Callable[..., Phone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del start_phone  # as above
    monkeypatch.setattr(pixel_room, "find_storage", lambda name: tmp_path / name)
    device = Device(name="phone-on-demand", transport="adb", serial="-", twin="pixel6")
    with open_transport(device) as transport:
        assert transport.run(["getprop", "ro.product.device"], timeout_s=60).stdout == "oriole\n"
    assert start_pixel(device) == start_pixel(device)
    assert start_pixel(device).twin is None
    assert start_pixel(replace(device, name="another")).serial != start_pixel(device).serial


@pytest.mark.parametrize("end", ["close", "kill"])
def test_nothing_is_left_when_its_process_ends(
    start_phone: Callable[..., Phone], end: str, await_gone: Callable[[list[psutil.Process]], None]
) -> None:
    del start_phone  # as above
    user = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with user:
        if user.stdout is None or user.stdin is None:
            raise AssertionError
        pid, folder = json.loads(user.stdout.readline())
        phone = psutil.Process(pid)
        family = [phone, *phone.children(recursive=True)]
        assert len(family) >= 4  # the keeper, the first process inside, the phone's daemon, the adb server
        if end == "kill":
            os.kill(user.pid, signal.SIGKILL)
        else:
            user.stdin.close()
        user.wait(60)
    await_gone(family)
    assert (end == "kill") == Path(folder).exists()
    shutil.rmtree(folder, ignore_errors=True)


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="only root can start the Pixel's stand-in"):
        pixel_room.launch_phone()


@pytest.mark.usefixtures("able_machine")
def test_a_machine_without_the_tools_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="mmdebstrap") as caught:
        android.find_root()
    assert caught.value.hint.startswith("run `apt-get install ")
    assert [path.suffix for path in (tmp_path / "rankship/twins").iterdir()] == [".lock"]
