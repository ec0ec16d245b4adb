"""What is adb's own: finding a phone, every way of not being let in, and a link that breaks or hangs."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from make.waiting import wait_until
from rankship_pipeline.foundation.errors import (
    AmbiguousDevice,
    CommandFailed,
    ConnectionLost,
    HostKeyChanged,
    InputError,
    Lacks,
    NoSpace,
    ReadOnly,
    TargetError,
    TargetTimeout,
    Unauthorised,
    Unreachable,
)
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.devices.device import Device
from rankship_targets.transport.adb.client import AdbClient, find_adb, list_attached, open_client
from rankship_targets.transport.adb.command import AdbCommand
from rankship_targets.transport.adb.connection import AdbTransport, open_adb, read_properties
from rankship_targets.transport.copying import copy_verified
from rankship_targets.twin.android_files import PROPERTIES
from rankship_targets.twin.phone import SDCARD_BYTES, SHELL_USER
from rankship_targets.twin.pixel import Phone, reach

pytestmark = pytest.mark.twin
StartPhone = Callable[..., Phone]
FINGERPRINT = PROPERTIES["ro.build.fingerprint"]


@pytest.fixture
def phone_apart(start_phone: StartPhone, pixel: Device) -> Iterator[tuple[Phone, Device]]:
    """Give a phone that may be broken, reached over the shared phone's adb server, which lives on."""
    phone = start_phone()
    yield phone, replace(pixel, serial=f"127.0.0.1:{phone.port}")
    phone.stop()


def find_daemon(phone: Phone) -> psutil.Process:
    for process in psutil.Process(phone.process.pid).children(recursive=True):
        ports = [one.laddr.port for one in process.net_connections()]
        if phone.port in ports and process.uids().real == SHELL_USER:
            return process
    pytest.fail("the phone has no daemon")


def connect(device: Device) -> AdbTransport:
    transport = open_adb(device)
    assert transport.run(["true"], timeout_s=30).code == 0
    return transport


# Finding it


def test_an_accepted_key_opens_the_phone(start_phone: StartPhone) -> None:
    connect(reach(start_phone("accept"), Device(name="phone", transport="adb", serial="-")))


def test_a_prompt_that_nobody_accepts_is_unauthorised(start_phone: StartPhone) -> None:
    device = reach(start_phone("ignore"), Device(name="phone", transport="adb", serial="-"))
    with pytest.raises(Unauthorised, match="has not accepted this computer's key") as caught:
        open_adb(device)
    assert "Allow USB debugging?" in caught.value.hint


@pytest.mark.slow
def test_a_phone_that_never_answers_is_offline(pixel: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        device = replace(pixel, serial=f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConnectionLost, match=r"offline|connecting"):
            open_adb(device)


def test_an_address_where_nothing_listens_is_unreachable(pixel: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(Unreachable, match="Connection refused"):
        open_adb(replace(pixel, serial=f"127.0.0.1:{port}"))


def test_a_phone_without_its_cable_is_unreachable(pixel: Device) -> None:
    with pytest.raises(Unreachable, match=r"1A2B3C4D5E.*no such device") as caught:
        open_adb(replace(pixel, serial="1A2B3C4D5E"))
    assert "cable" in caught.value.hint


def test_a_device_without_a_serial_is_the_inventorys_mistake() -> None:
    with pytest.raises(InputError, match="serial"):
        open_adb(Device(name="phone", transport="adb"))


def test_two_devices_with_one_serial_are_ambiguous(pixel: Device) -> None:
    twice = "CLONE device model:Pixel_6\n" * 2
    with serve_list(twice) as port, pytest.raises(AmbiguousDevice, match="2 attached devices have the serial CLONE"):
        open_adb(replace(pixel, serial="CLONE", port=port))


def test_states_of_devices_are_told_as_adb_says_them(pixel: Device) -> None:
    lines = [
        "1A2B offline usb:1-2 transport_id:3",
        "3C4D no permissions (user in plugdev group; are your udev rules wrong?); see [http://x] usb:1-3",
        "5E6F recovery product:oriole model:Pixel_6 device:oriole transport_id:4",
    ]
    with serve_list("".join(f"{line}\n" for line in lines)) as port:
        found = list_attached(open_client(replace(pixel, port=port)))
        assert [one.state.partition(" (")[0] for one in found] == ["offline", "no permissions", "recovery"]
        assert found[2].model == "Pixel 6"
        for serial, error, words in (
            ("1A2B", ConnectionLost, "offline"),
            ("3C4D", Unreachable, "may not open it"),
            ("5E6F", ConnectionLost, "recovery"),
        ):
            with pytest.raises(error, match=words):
                open_adb(replace(pixel, serial=serial, port=port))


@contextlib.contextmanager
def serve_list(text: str) -> Iterator[int]:
    """Play an adb server that knows its version and a list of devices."""
    answers = {b"host:version": "0029", b"host:devices-l": text}

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(int(connection.recv(4), 16))
                    answer = answers[request].encode()
                    connection.sendall(b"OKAY%04x%s" % (len(answer), answer))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_attached_phones_are_listed_with_their_model(pixel: Device) -> None:
    connect(pixel)
    attached = {one.serial: one for one in list_attached(open_client(pixel))}
    assert (attached[pixel.serial or ""].state, attached[pixel.serial or ""].model) == ("device", "Pixel 6")


def test_properties_are_read(pixel: Device) -> None:
    assert read_properties(connect(pixel)) == PROPERTIES


def test_another_build_than_the_pinned_one_is_refused(pixel: Device) -> None:
    connect(replace(pixel, fingerprint=FINGERPRINT))
    with pytest.raises(HostKeyChanged) as caught:
        open_adb(replace(pixel, fingerprint="google/oriole/oriole:12/OLD"))
    assert FINGERPRINT in str(caught.value)
    assert "google/oriole/oriole:12/OLD" in str(caught.value)
    assert "fingerprint" in caught.value.hint


# The program itself


def test_a_machine_without_adb_lacks_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ANDROID_SDK_ROOT", raising=False)
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path))
    with pytest.raises(Lacks, match="adb") as caught:
        find_adb()
    assert "apt-get install adb" in caught.value.hint
    program = tmp_path / "platform-tools" / "adb"
    program.parent.mkdir()
    program.touch(0o755)
    assert find_adb() == str(program)


def test_a_server_that_hangs_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        client = AdbClient(program=find_adb(), server=("127.0.0.1", hung.getsockname()[1]))
        with pytest.raises(TargetTimeout, match="adb devices"):
            client.call("devices", timeout_s=1)


def test_a_server_that_is_gone_is_unreachable(pixel: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(Unreachable, match="Connection refused"):
        open_adb(replace(pixel, port=port))


# A link that breaks or hangs


def test_a_phone_that_stops_answering_is_a_timeout_and_may_come_back(phone_apart: tuple[Phone, Device]) -> None:
    phone, device = phone_apart
    transport = connect(device)
    daemon = find_daemon(phone)
    daemon.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TargetTimeout, match=r"true did not end within 1 s"):
            transport.run(["true"], timeout_s=1)
    finally:
        daemon.send_signal(signal.SIGCONT)
    assert transport.run(["true"], timeout_s=30).code == 0


def test_a_cable_pulled_while_a_command_runs_is_no_success(phone_apart: tuple[Phone, Device]) -> None:
    phone, device = phone_apart
    lines = connect(device).stream(["sh", "-c", "echo ready; sleep 600"], timeout_s=60)
    assert next(lines) == "ready"
    phone.stop()
    with pytest.raises(ConnectionLost):
        next(lines)
    with pytest.raises(ConnectionLost):
        open_adb(device)


@pytest.mark.parametrize("direction", ["send", "fetch"])
def test_a_cable_pulled_in_mid_copy_is_a_lost_connection(
    phone_apart: tuple[Phone, Device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    phone, device = phone_apart
    transport = connect(device)
    local = tmp_path / "local" / "file"
    local.parent.mkdir()
    local.write_bytes(b"x" * 50_000_000)
    copy_verified(transport, local, "file", hash_file(local))
    daemon = find_daemon(phone)
    failures: list[TargetError] = []

    paused = threading.Event()

    def pause(*_: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # once it was killed
            daemon.send_signal(signal.SIGSTOP)
        paused.set()

    def copy() -> None:
        try:
            if direction == "send":
                copy_verified(transport, local, "file2", hash_file(local), on_progress=pause)
            else:
                transport.fetch("file", tmp_path / "back")
        except TargetError as failure:
            failures.append(failure)

    monkeypatch.setattr(AdbCommand, "put_off", lambda _, __: pause())  # as each piece comes
    worker = threading.Thread(target=copy)
    worker.start()
    assert paused.wait(60)
    wait_until(lambda: daemon.status() == psutil.STATUS_STOPPED)
    assert worker.is_alive()
    daemon.kill()
    worker.join(60)
    assert [isinstance(failure, ConnectionLost) for failure in failures] == [True]
    assert list(tmp_path.iterdir()) == [local.parent]


# Files


def test_a_full_card_is_no_space(pixel: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(SDCARD_BYTES + 1_000_000))
    transport = connect(pixel)
    monkeypatch.setattr(transport, "free_bytes", lambda _: 1 << 40)  # it fills up while the copy runs
    with pytest.raises(NoSpace, match="No space left"):
        copy_verified(transport, tmp_path / "file", "/sdcard/file", hash_file(tmp_path / "file"))
    assert transport.run(["rm", "-f", "--", "/sdcard/file"], timeout_s=30).code == 0


def test_the_system_is_read_only(pixel: Device, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ReadOnly, match="Read-only"):
        copy_verified(connect(pixel), tmp_path / "file", "/system/file", hash_file(tmp_path / "file"))


def test_what_may_not_run_is_code_126(pixel: Device, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/system/bin/sh\necho ran\n")
    transport = connect(pixel)
    copy_verified(transport, script, "/sdcard/script", hash_file(script))
    assert transport.run(["/sdcard/script"], timeout_s=30).code == 126
    copy_verified(transport, script, "script", hash_file(script))
    assert transport.run(["chmod", "755", "script"], timeout_s=30).code == 0
    assert transport.run(["/data/local/tmp/script"], timeout_s=30).stdout == "ran\n"


def test_relative_paths_start_where_the_shell_may_write(pixel: Device, tmp_path: Path) -> None:
    transport = connect(pixel)
    (tmp_path / "file").write_bytes(b"content")
    copy_verified(transport, tmp_path / "file", "relative", hash_file(tmp_path / "file"))
    assert transport.run(["cat", "/data/local/tmp/relative"], timeout_s=30).stdout == "content"
    assert transport.run(["cat", "relative"], timeout_s=30).stdout == "content"
    transport.fetch("relative", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"content"
    assert transport.free_bytes(".") > 0


def test_a_folder_is_not_fetched(pixel: Device, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"[Ii]s a directory"):
        connect(pixel).fetch("/data/local/tmp", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_what_the_shell_may_not_read_fails_and_leaves_nothing(pixel: Device, tmp_path: Path) -> None:
    transport = connect(pixel)
    transport.run(["sh", "-c", "echo secret > closed; chmod 000 closed"], timeout_s=30)
    with pytest.raises(CommandFailed, match="Permission denied"):
        transport.fetch("closed", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []
