"""Logging in to a real SSH server with the keys that people have, and without any; and aliases of ~/.ssh/config."""

import getpass
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from make.ssh_keys import holding_keys, make_security_blob, write_security_key
from make.ssh_servers import CONFIGURATION, start_server
from rankship_pipeline.foundation.errors import AuthError, InputError, Unreachable
from rankship_targets.devices.device import Device, find_device
from rankship_targets.transport.ssh.alias import read_alias
from rankship_targets.transport.ssh.connection import open_ssh
from rankship_targets.verbs.devices import devices


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.getfixturevalue("ssh_server").device
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys, and no agent."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return folder


@pytest.fixture
def socket() -> Iterator[Path]:
    path = Path("/tmp") / f"agent-{os.getpid()}"  # noqa: S108 - a socket's path must be short
    yield path
    path.unlink(missing_ok=True)


def read_key(device: Device) -> paramiko.PKey:
    return paramiko.PKey.from_path(device.key_file or "")


def test_a_security_key_in_the_agent_does_not_hide_the_good_key_behind_it(device: Device, socket: Path) -> None:
    with holding_keys(socket, [make_security_blob(), read_key(device)]) as asked:
        open_ssh(replace(device, key_file=None)).close()
    assert asked == [read_key(device).asbytes()], "nobody is asked for a touch in vain"


def test_a_key_that_the_agent_does_not_sign_with_does_not_hide_the_good_one(device: Device, socket: Path) -> None:
    stranger = paramiko.ECDSAKey.generate()
    with holding_keys(socket, [stranger.asbytes(), read_key(device)]) as asked:
        open_ssh(replace(device, key_file=None)).close()
    assert len(asked) == 2


def test_more_keys_than_the_server_bears_do_not_hide_the_good_one(device: Device, socket: Path) -> None:
    strangers = [paramiko.ECDSAKey.generate() for _ in range(7)]
    with holding_keys(socket, [*strangers, read_key(device)]):
        open_ssh(replace(device, key_file=None)).close()


def test_only_a_security_key_that_is_not_touched_is_named(device: Device, socket: Path) -> None:
    with holding_keys(socket, [make_security_blob()]), pytest.raises(AuthError) as caught:
        open_ssh(replace(device, key_file=None))
    assert "sk-ssh-ed25519@openssh.com held" in str(caught.value)
    assert "touched?" in str(caught.value)


@pytest.mark.parametrize("with_public", [True, False])
def test_a_key_file_of_a_security_key_needs_the_agent(device: Device, tmp_path: Path, with_public: bool) -> None:  # noqa: FBT001
    path = tmp_path / "my key_sk"
    write_security_key(path, with_public=with_public)
    with pytest.raises(AuthError, match="on a security key") as caught:
        open_ssh(replace(device, key_file=str(path)))
    assert f"ssh-add '{path}'" in caught.value.hint


def test_a_key_file_with_a_passphrase_is_used_through_the_agent(device: Device, socket: Path, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(Path(device.key_file or "").read_bytes())
    path.chmod(0o600)
    Path(f"{path}.pub").write_text(Path(f"{device.key_file}.pub").read_text())
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", path], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(AuthError, match="passphrase"):
        open_ssh(replace(device, key_file=str(path)))
    with holding_keys(socket, [read_key(device)]):
        open_ssh(replace(device, key_file=str(path))).close()


def test_the_usual_files_are_tried_past_one_that_cannot_be_used(device: Device, home: Path) -> None:
    write_security_key(home / ".ssh/id_ed25519_sk")
    (home / ".ssh/id_ed25519").write_text("no key")
    (home / ".ssh/id_rsa").write_bytes(Path(device.key_file or "").read_bytes())
    open_ssh(replace(device, key_file=None)).close()
    (home / ".ssh/id_rsa").unlink()
    with pytest.raises(AuthError, match="on a security key") as caught:
        open_ssh(replace(device, key_file=None))
    assert "id_ed25519 is not a readable private key" in str(caught.value)


def test_without_any_key_the_hint_makes_one_and_brings_it_there(device: Device) -> None:
    with pytest.raises(AuthError, match="none in the SSH agent") as caught:
        open_ssh(replace(device, key_file=None))
    assert "ssh-keygen -t ed25519" in caught.value.hint
    assert f"`ssh-copy-id -p {device.port} {device.user}@127.0.0.1`" in caught.value.hint


def test_a_server_for_passwords_only_says_so(tmp_path: Path) -> None:
    configuration = CONFIGURATION.replace(
        "PasswordAuthentication no", "PubkeyAuthentication no\nPasswordAuthentication yes"
    )
    (tmp_path / "server").mkdir()
    server = start_server(tmp_path / "server", configuration, ())
    try:
        for key_file in (server.device.key_file, None):
            with pytest.raises(AuthError, match="takes no keys, only password") as caught:
                open_ssh(replace(server.device, key_file=key_file))
            assert "PubkeyAuthentication yes" in caught.value.hint
            assert "ssh-copy-id" in caught.value.hint
    finally:
        server.stop()


def add(inventory: Path, name: str, address: str, fingerprint: str) -> Device:
    words = ["--inventory", str(inventory), "--python", sys.executable, "--fingerprint", fingerprint]
    assert devices(["add", name, address, *words]) == 0
    return find_device(name, inventory)


def find_fingerprint(device: Device) -> str:
    return paramiko.PKey.from_type_string(*_split(device.host_key or "")).fingerprint


def _split(text: str) -> tuple[str, bytes]:
    import base64

    kind, blob = text.split()[:2]
    return kind, base64.b64decode(blob)


@pytest.mark.parametrize("address", ["desk", "{me}@desk", "{me}@desk:{port}"])
def test_an_alias_is_added_with_its_address_port_user_and_key(
    address: str, device: Device, home: Path, tmp_path: Path
) -> None:
    key = home / ".ssh" / "my key"
    key.write_bytes(Path(device.key_file or "").read_bytes())
    key.chmod(0o600)
    (home / ".ssh/config").write_text(
        f"Match originalhost desk\n  HostName {device.host}\n  Port {device.port}\n"
        f'  User {getpass.getuser()}\n  IdentityFile "~/.ssh/my key"\n'
    )
    text = address.format(me=getpass.getuser(), port=device.port)
    found = add(tmp_path / "devices.toml", "my board", text, find_fingerprint(device))
    assert (found.host, found.port, found.user) == (device.host, device.port, device.user)
    assert found.key_file == str(key)


def test_an_alias_behind_a_host_needs_that_host_first(
    device: Device, start_sshd: Callable[[], object], home: Path, tmp_path: Path
) -> None:
    gate: Device = start_sshd().device  # type: ignore[attr-defined]
    inventory = tmp_path / "devices.toml"
    config = "".join(
        f"Host {name}\n HostName {one.host}\n Port {one.port}\n User {one.user}\n IdentityFile {one.key_file}\n"
        for name, one in (("gate", gate), ("desk", device))
    )
    (home / ".ssh/config").write_text(config.replace("Host desk\n", "Host desk\n ProxyJump gate\n"))
    with pytest.raises(InputError, match="reached through gate") as caught:
        add(inventory, "board", "desk", find_fingerprint(device))
    assert "`rankship devices add NAME gate`" in caught.value.hint
    add(inventory, "the gate", "gate", find_fingerprint(gate))
    assert add(inventory, "board", "desk", find_fingerprint(device)).jump == "the gate"


def test_what_cannot_be_followed_is_refused_or_told(home: Path, tmp_path: Path) -> None:
    (home / ".ssh/config").write_text("Host desk\n HostName 127.0.0.1\n ProxyCommand nc %h %p\n")
    with pytest.raises(InputError, match="ProxyCommand") as caught:
        devices(["add", "x", "desk", "--inventory", str(tmp_path / "devices.toml")])
    assert "--jump" in caught.value.hint
    (home / ".ssh/config").write_text("Host desk\n HostName 127.0.0.1\n IdentityAgent ~/agent\n HostKeyAlias other\n")
    alias = read_alias("desk")
    assert alias
    assert alias.not_followed == ("identityagent", "hostkeyalias")
    (home / ".ssh/config").write_text("Hots desk\n")
    with pytest.raises(InputError, match="cannot read your configuration"):
        read_alias("desk")


def test_an_alias_without_the_ssh_program_is_read_by_paramiko(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".ssh/config").write_text("Host desk\n HostName 127.0.0.1\n Port 2222\n IdentityFile ~/.ssh/mine\n")
    whole = read_alias("desk")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert read_alias("desk") == whole
    assert whole
    assert (whole.host, whole.port, whole.key_files) == ("127.0.0.1", 2222, (str(home / ".ssh/mine"),))


def test_a_name_that_is_nothing_is_not_an_address(home: Path, tmp_path: Path) -> None:
    for text in ("desk", " -oProxyCommand=x", "a b", "desk:22"):
        with pytest.raises(InputError, match="is not an address"):
            devices(["add", "x", text, "--inventory", str(tmp_path / "devices.toml")])
    assert home.is_dir()


def test_an_alias_written_into_the_inventory_by_hand_is_explained(device: Device, home: Path) -> None:
    (home / ".ssh/config").write_text(f"Host desk.invalid\n HostName 127.0.0.1\n Port {device.port}\n")
    with pytest.raises(Unreachable, match="is not a known host name") as caught:
        open_ssh(replace(device, host="desk.invalid"))
    assert f'write host = "127.0.0.1" and port = {device.port} in the inventory' in caught.value.hint
