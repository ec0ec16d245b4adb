"""How a device comes into the inventory, against a real SSH server: nothing is trusted before it was compared."""

import getpass
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankship_pipeline.foundation.errors import AuthError, CommandFailed, HostKeyChanged, InputError, Lacks, Unreachable
from rankship_targets.devices.device import Device, find_device, load_inventory
from rankship_targets.enrol.enrolment import describe_key, enrol_phone, parse_address, pin_host_key
from rankship_targets.session.session import open_session
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import Completed
from rankship_targets.verbs.devices import devices


@pytest.fixture
def board(request: pytest.FixtureRequest) -> Device:
    found: Device = request.getfixturevalue("ssh_server").device
    return found


def fingerprint(device: Device, folder: Path) -> str:
    (folder / "shown.pub").write_text(f"{device.host_key}\n")
    done = subprocess.run(["ssh-keygen", "-lf", folder / "shown.pub"], check=True, capture_output=True, text=True)
    return done.stdout.split()[1]


def add(board: Device, inventory: Path, *flags: str, name: str = "my board") -> int:
    where = f"{getpass.getuser()}@{board.host}:{board.port}"
    fixed = ["--key", str(board.key_file), "--python", sys.executable, "--inventory", str(inventory)]
    return devices(["add", name, where, *fixed, *flags])


def test_a_board_is_added_by_the_fingerprint_and_can_be_used(board: Device, tmp_path: Path) -> None:
    inventory = tmp_path / "devices.toml"
    assert add(board, inventory, "--fingerprint", fingerprint(board, tmp_path)) == 0
    found = find_device("my board", inventory)
    assert (found.host_key or "").split()[:2] == (board.host_key or "").split()[:2]
    assert (found.host, found.port, found.key_file) == (board.host, board.port, board.key_file)
    assert found.label
    with open_session(replace(found, workdir=str(tmp_path / "work"))) as session:
        assert session.probe().python


def test_another_fingerprint_is_refused_and_nothing_is_written(board: Device, tmp_path: Path) -> None:
    right = fingerprint(board, tmp_path)
    for wrong in (right[:-1], right.lower(), right.removeprefix("SHA256:"), "", f" {right}"):
        with pytest.raises(HostKeyChanged) as caught:
            add(board, tmp_path / "devices.toml", "--fingerprint", wrong)
        assert right in str(caught.value)
    assert not (tmp_path / "devices.toml").exists()


class Terminal(io.StringIO):
    """A keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("answer", ["", "y\n", "no\n", "YES\n", "yes please\n"])
def test_only_a_typed_yes_pins(board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    with pytest.raises(InputError, match="not confirmed"):
        add(board, tmp_path / "devices.toml")
    assert not (tmp_path / "devices.toml").exists()


def test_the_question_shows_the_fingerprint_and_how_to_compare_it(
    board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    assert add(board, tmp_path / "devices.toml") == 0
    asked = capsys.readouterr().err
    assert fingerprint(board, tmp_path) in asked
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in asked
    assert "my board" in load_inventory(tmp_path / "devices.toml")


@pytest.mark.parametrize(
    ("kind", "file"), [("ssh-ed25519", "ed25519"), ("ecdsa-sha2-nistp256", "ecdsa"), ("ssh-rsa", "rsa")]
)
def test_the_file_to_compare_is_that_of_the_keys_kind(kind: str, file: str) -> None:
    device = Device(name="x", transport="ssh", host="h")
    assert f"ssh_host_{file}_key.pub" in describe_key(device, kind, "SHA256:x")


def test_without_a_terminal_the_fingerprint_must_be_given(
    board: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    with pytest.raises(InputError, match="no terminal"):
        add(board, tmp_path / "devices.toml")


def test_a_board_that_refuses_us_or_lacks_python_is_not_written(board: Device, tmp_path: Path) -> None:
    inventory, right = tmp_path / "devices.toml", fingerprint(board, tmp_path)
    key = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    with pytest.raises(AuthError):
        add(board, inventory, "--fingerprint", right, "--key", str(key))
    with pytest.raises(Lacks):
        add(board, inventory, "--fingerprint", right, "--python", "no-such-python")
    assert not inventory.exists()


def test_a_known_name_is_refused_before_the_board_is_asked(tmp_path: Path) -> None:
    inventory = tmp_path / "devices.toml"
    devices(["add", "taken", "--twin", "pi4", "--inventory", str(inventory)])
    with pytest.raises(InputError, match="already"):
        devices(["add", "taken", "pi@no-such-host.invalid", "--inventory", str(inventory)])


def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="is not a known host name"):
        devices(["add", "x", "pi@no-such-host.invalid", "--inventory", str(tmp_path / "devices.toml")])


def test_the_key_is_fetched_through_the_jump_host(board: Device, start_sshd: Callable[[], Any], tmp_path: Path) -> None:
    inventory = tmp_path / "devices.toml"
    gate = start_sshd().device
    add(gate, inventory, "--fingerprint", fingerprint(gate, tmp_path), name="gate")
    assert add(board, inventory, "--fingerprint", fingerprint(board, tmp_path), "--jump", "gate") == 0
    found = find_device("my board", inventory)
    assert found.via == find_device("gate", inventory)
    assert (found.host_key or "").split()[1] == (board.host_key or "").split()[1]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("pi@raspberrypi.local", ("pi", "raspberrypi.local", 22)),
        ("pi@10.0.0.7:2222", ("pi", "10.0.0.7", 2222)),
        ("jörg.müller@[fe80::1%eth0]:22", ("jörg.müller", "fe80::1%eth0", 22)),
        ("pi@[::1]", ("pi", "::1", 22)),
    ],
)
def test_addresses_are_read(text: str, address: tuple[str, str, int]) -> None:
    device = parse_address("x", text)
    assert (device.user, device.host, device.port) == address


def test_an_ecdsa_only_server_is_pinned_by_that_key(
    start_sshd: Callable[[str], Any], sshd_configuration: str, tmp_path: Path
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-C", "", "-f", tmp_path / "ecdsa"], check=True)
    server = start_sshd(sshd_configuration.replace("{folder}/host_key", str(tmp_path / "ecdsa")))
    pinned = pin_host_key(replace(server.device, host_key=None), None, lambda _: "yes")
    assert pinned.host_key == (tmp_path / "ecdsa.pub").read_text().strip()


PROPERTIES = {
    "ro.build.fingerprint": "google/oriole/oriole:14/AP2A/1:user/release-keys",
    "ro.product.model": "Pixel 6",
}


def answer_properties(_: FakeTransport, argv: Sequence[str]) -> Completed:
    return Completed(code=0, stdout=PROPERTIES.get(argv[1], "") + "\n", stderr="")


def test_a_phone_is_pinned_by_serial_and_build(tmp_path: Path) -> None:
    asked = []

    def connect(device: Device) -> FakeTransport:
        asked.append((device.serial, device.fingerprint))
        return FakeTransport({"getprop": answer_properties})

    inventory = tmp_path / "devices.toml"
    assert enrol_phone("pixel6", "1A2B3C4D5E", inventory, connect) == "Pixel 6"
    assert asked == [("1A2B3C4D5E", None)]
    found = find_device("pixel6", inventory)
    assert (found.transport, found.serial) == ("adb", "1A2B3C4D5E")
    assert found.fingerprint == "google/oriole/oriole:14/AP2A/1:user/release-keys"
    assert found.workdir == "/data/local/tmp/rankship"


def test_a_phone_that_tells_no_build_is_not_written(tmp_path: Path) -> None:
    silent = FakeTransport({"getprop": lambda *_: Completed(code=0, stdout="\n", stderr="")})
    with pytest.raises(CommandFailed, match=r"ro\.build\.fingerprint"):
        enrol_phone("pixel6", "1A2B", tmp_path / "devices.toml", lambda _: silent)
    assert not (tmp_path / "devices.toml").exists()
