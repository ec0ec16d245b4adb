"""What can go wrong on the way to a device over SSH, against a real server."""

import os
import select
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self

import pytest

from rankship_pipeline.foundation.errors import (
    AuthError,
    CommandFailed,
    ConnectionLost,
    HostKeyChanged,
    InputError,
    ReadOnly,
    TargetTimeout,
    Unreachable,
)
from rankship_pipeline.foundation.files import hash_file
from rankship_targets.devices.device import Device
from rankship_targets.transport.copying import copy_verified, name_part
from rankship_targets.transport.ssh import connection as ssh
from rankship_targets.transport.ssh import route as ssh_route
from rankship_targets.transport.ssh.connection import open_ssh


def make_key(folder: Path, kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", folder / kind], check=True)
    return folder / kind


def fingerprint(public: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", public], check=True, capture_output=True, text=True)
    return done.stdout.split()[1]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.getfixturevalue("ssh_server").device
    return found


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_another_host_key_is_refused_with_both_fingerprints(device: Device, tmp_path: Path, kind: str) -> None:
    public = make_key(tmp_path, kind).with_suffix(".pub")
    with pytest.raises(HostKeyChanged) as caught:
        open_ssh(replace(device, host_key=public.read_text()))
    assert fingerprint(public) in str(caught.value)
    (tmp_path / "true.pub").write_text(device.host_key or "")
    assert fingerprint(tmp_path / "true.pub") in str(caught.value)


def test_host_key_that_is_none_is_refused(device: Device) -> None:
    for text in ("", "ssh-ed25519", "ssh-ed25519 ****", "ssh-ed25519 AAAA-replace-me", "nonsense AAAA"):
        with pytest.raises(InputError, match="host_key"):
            open_ssh(replace(device, host_key=text))


def test_unknown_user_key_is_refused(device: Device, tmp_path: Path) -> None:
    with pytest.raises(AuthError, match="refused the login"):
        open_ssh(replace(device, key_file=str(make_key(tmp_path))))


def test_absent_key_file_is_named(device: Device, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no key file"):
        open_ssh(replace(device, key_file=str(tmp_path / "absent")))


def test_refused_port_is_a_lost_connection(device: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    with pytest.raises(ConnectionLost, match="refused"):
        open_ssh(replace(device, port=port))


def test_unknown_host_is_a_lost_connection(device: Device) -> None:
    with pytest.raises(ConnectionLost):
        open_ssh(replace(device, host="no-such-host.invalid"))


def test_silent_server_times_out(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises((TargetTimeout, ConnectionLost)):
        open_ssh(replace(device, port=int(server.getsockname()[1])))


def test_server_that_is_no_ssh_server_is_a_lost_connection(device: Device) -> None:
    def answer(server: socket.socket) -> None:
        with server.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(ConnectionLost):
            open_ssh(replace(device, port=int(server.getsockname()[1])))
        thread.join()


def test_server_that_dies_is_a_lost_connection(start_sshd: Callable[[], Any], tmp_path: Path) -> None:
    server = start_sshd()
    with open_ssh(server.device) as transport:
        lines = transport.stream(["sh", "-c", "echo ready; sleep 600"], timeout_s=60)
        assert next(lines) == "ready"
        server.stop()
        with pytest.raises(ConnectionLost):
            next(lines)
        (tmp_path / "file").write_bytes(b"content")
        with pytest.raises(ConnectionLost):
            copy_verified(transport, tmp_path / "file", str(tmp_path / "there"), hash_file(tmp_path / "file"))
        with pytest.raises(ConnectionLost):
            transport.run(["true"], timeout_s=5)
        with pytest.raises(ConnectionLost):
            transport.fetch("there", tmp_path / "back")


def test_server_that_dies_while_copying_is_a_lost_connection(start_sshd: Callable[[], Any], tmp_path: Path) -> None:
    server = start_sshd()
    (tmp_path / "file").write_bytes(b"x" * 50_000_000)
    with open_ssh(server.device) as transport:
        killer = Thread(target=server.stop)
        killer.start()
        with pytest.raises(ConnectionLost):
            copy_for_long(transport, tmp_path / "file")
        killer.join()


class StallingProxy:
    """Passes bytes on to a server until it is told to swallow nothing more: a cable that is out, seen from a host."""

    def __init__(self, port: int) -> None:
        self.stalled = Event()
        self.stall_after_bytes: int | None = None
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # that the kernel takes no more than this
        self.upstream = socket.create_connection(("127.0.0.1", port))
        self.thread = Thread(target=self._pass_on)
        self.ended = Event()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.upstream.close()
        self.server.close()

    def _pass_on(self) -> None:
        client, _ = self.server.accept()
        with client:
            while not self.stalled.is_set() and not self.ended.is_set():
                for ready in select.select([client, self.upstream], [], [], 0.05)[0]:
                    other = self.upstream if ready is client else client
                    data = ready.recv(1 << 16)
                    other.sendall(data)
                    if self.stall_after_bytes is not None:
                        self.stall_after_bytes -= len(data)
                        if self.stall_after_bytes < 0:
                            self.stalled.set()
            self.ended.wait()


@pytest.mark.parametrize(
    "act",
    [
        lambda transport, _: transport.run(["true"], timeout_s=0.5),
        lambda transport, _: next(transport.stream(["true"], timeout_s=0.5)),
        lambda transport, path: transport.feed(["sha256sum"], path, timeout_s=0.5),
        lambda transport, path: transport.fetch(f"{path}", path.with_name("back")),
    ],
)
def test_link_that_swallows_everything_does_not_hang(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[ssh.SshTransport, Path], None]
) -> None:
    monkeypatch.setattr(ssh_route, "SILENCE_LIMIT_MS", 1000)
    monkeypatch.setattr(ssh, "STEP_TIMEOUT_S", 1.0)
    (tmp_path / "file").write_bytes(b"x" * 50_000_000)
    with StallingProxy(device.port) as proxy:
        port = int(proxy.server.getsockname()[1])
        with open_ssh(replace(device, port=port)) as transport:
            assert transport.run(["true"], timeout_s=30).code == 0
            proxy.stalled.set()
            with pytest.raises((ConnectionLost, TargetTimeout)):
                act(transport, tmp_path / "file")


def test_link_that_swallows_everything_while_copying_does_not_hang(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_route, "SILENCE_LIMIT_MS", 1000)
    monkeypatch.setattr(ssh, "STEP_TIMEOUT_S", 3.0)  # where all of the window was sent, the kernel waits for nothing
    (tmp_path / "file").write_bytes(b"x" * 100_000_000)
    with StallingProxy(device.port) as proxy:
        port = int(proxy.server.getsockname()[1])
        with open_ssh(replace(device, port=port)) as transport:
            proxy.stall_after_bytes = 5_000_000
            with pytest.raises((ConnectionLost, TargetTimeout)):
                copy_verified(transport, tmp_path / "file", str(tmp_path / "there"), hash_file(tmp_path / "file"))


def test_a_copy_that_stalled_goes_on_where_it_stopped(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_route, "SILENCE_LIMIT_MS", 1000)
    monkeypatch.setattr(ssh, "STEP_TIMEOUT_S", 3.0)  # where all of the window was sent, the kernel waits for nothing
    file, place = tmp_path / "file", str(tmp_path / "there")
    file.write_bytes(os.urandom(40_000_000))
    with StallingProxy(device.port) as proxy:
        port = int(proxy.server.getsockname()[1])
        with open_ssh(replace(device, port=port)) as transport:
            proxy.stall_after_bytes = 15_000_000
            with pytest.raises((ConnectionLost, TargetTimeout)):
                copy_verified(transport, file, place, hash_file(file))
    begun = Path(name_part(place, hash_file(file))).stat().st_size
    assert begun > 1_000_000
    heard: list[tuple[int, int]] = []
    with open_ssh(device) as transport:
        assert copy_verified(transport, file, place, hash_file(file), on_progress=lambda *state: heard.append(state))
    assert heard[0][0] > begun
    assert hash_file(Path(place)) == hash_file(file)


def copy_for_long(transport: ssh.SshTransport, path: Path) -> None:
    for _ in range(100):
        transport.feed(["cat"], path, timeout_s=60)


def test_closed_connection_says_so(device: Device) -> None:
    transport = open_ssh(device)
    transport.close()
    transport.close()
    with pytest.raises(ConnectionLost):
        transport.run(["true"], timeout_s=5)


def test_noisy_login_shell_is_named(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankship_targets.transport.ssh.command._WRAPPER", "echo Welcome!")
    with open_ssh(device) as transport, pytest.raises(CommandFailed, match="Welcome"):
        transport.run(["true"], timeout_s=30)


def test_no_error_shows_a_private_key(device: Device, tmp_path: Path) -> None:
    secret = make_key(tmp_path)
    with pytest.raises(AuthError) as caught:
        open_ssh(replace(device, key_file=str(secret)))
    assert secret.read_text().splitlines()[1] not in f"{caught.value} {caught.value.hint}"


def test_a_server_without_sftp_is_enough(device_without_sftp: Device, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open_ssh(device_without_sftp) as transport:
        assert copy_verified(transport, tmp_path / "file", str(tmp_path / "there"), hash_file(tmp_path / "file"))
    assert (tmp_path / "there").read_bytes() == b"content"


# Through a jump host


@pytest.fixture
def gate(start_sshd: Callable[[], Any]) -> Device:
    found: Device = replace(start_sshd().device, name="gate")
    return found


def test_commands_and_files_go_through_a_jump_host(device: Device, gate: Device, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    with open_ssh(replace(device, jump="gate", via=gate)) as transport:
        # the server sees the gate's connection as coming from the loopback, so its client port tells nothing
        assert transport.run(["sh", "-c", "echo $SSH_CONNECTION"], timeout_s=30).stdout.split()[-1] == str(device.port)
        copy_verified(transport, tmp_path / "file", str(tmp_path / "there"), hash_file(tmp_path / "file"))
        transport.fetch(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


def test_both_keys_are_pinned_behind_a_jump_host(device: Device, gate: Device) -> None:
    for wrong in (
        replace(device, jump="gate", via=gate, host_key=gate.host_key),
        replace(device, jump="gate", via=replace(gate, host_key=device.host_key)),
    ):
        with pytest.raises(HostKeyChanged):
            open_ssh(wrong)


def test_a_closed_connection_takes_the_one_to_the_jump_host_along(device: Device, gate: Device) -> None:
    transport = open_ssh(replace(device, jump="gate", via=gate))
    jump = transport._jump
    assert jump is not None
    transport.close()
    with pytest.raises(ConnectionLost):
        jump.run(["true"], timeout_s=5)


def test_a_jump_host_that_dies_is_a_lost_connection(device: Device, start_sshd: Callable[[], Any]) -> None:
    server = start_sshd()
    with open_ssh(replace(device, via=server.device)) as transport:
        assert transport.run(["true"], timeout_s=30).code == 0
        server.stop()
        with pytest.raises((ConnectionLost, TargetTimeout)):
            transport.run(["true"], timeout_s=5)


def test_a_jump_host_that_cannot_get_there_is_unreachable(device: Device, gate: Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    with pytest.raises(Unreachable, match=r"gate .* cannot reach"):
        open_ssh(replace(device, port=port, via=gate))
    with pytest.raises(Unreachable, match="gate"):
        open_ssh(replace(device, via=replace(gate, port=port)))


def test_a_jump_host_that_forbids_forwarding_says_what_to_change(
    device: Device, start_sshd: Callable[[str], Any], request: pytest.FixtureRequest
) -> None:
    configuration = request.getfixturevalue("sshd_configuration")
    gate = start_sshd(configuration + "AllowTcpForwarding no\n").device
    with pytest.raises(Unreachable) as caught:
        open_ssh(replace(device, via=gate))
    assert "AllowTcpForwarding" in caught.value.hint


def test_a_device_behind_a_jump_host_that_falls_silent_does_not_hang(
    device: Device, gate: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_route, "SILENCE_LIMIT_MS", 1000)
    monkeypatch.setattr(ssh, "KEEPALIVE_S", 1)
    (tmp_path / "file").write_bytes(b"x" * 100_000_000)
    with StallingProxy(device.port) as proxy:
        port = int(proxy.server.getsockname()[1])
        with open_ssh(replace(device, port=port, via=gate)) as transport:
            proxy.stall_after_bytes = 5_000_000
            with pytest.raises((ConnectionLost, TargetTimeout)):
                copy_verified(transport, tmp_path / "file", str(tmp_path / "there"), hash_file(tmp_path / "file"))


# Faults with names


def test_what_never_became_a_connection_is_unreachable(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = int(silent.getsockname()[1])
        for wrong in (
            replace(device, host="no-such-host.invalid"),
            replace(device, port=1),
            replace(device, port=port),
        ):
            with pytest.raises(Unreachable) as caught:
                open_ssh(wrong)
            assert caught.value.hint


@pytest.mark.parametrize("host", ["a" * 70 + ".local", "..", "größe\udc80"])
def test_hosts_that_no_name_could_be_are_unreachable(device: Device, host: str) -> None:
    with pytest.raises(Unreachable):
        open_ssh(replace(device, host=host))


def test_a_key_file_with_a_passphrase_or_without_a_key_is_named(device: Device, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "locked"], check=True)
    with pytest.raises(AuthError, match="passphrase") as caught:
        open_ssh(replace(device, key_file=str(tmp_path / "locked")))
    assert "ssh-add" in caught.value.hint
    (tmp_path / "text").write_text("no key")
    for name in ("text", "locked.pub"):
        with pytest.raises(InputError, match="not a readable private key"):
            open_ssh(replace(device, key_file=str(tmp_path / name)))


def test_no_key_at_all_is_a_refused_login(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(AuthError, match="no key"):
        open_ssh(replace(device, key_file=None))


def test_a_read_only_disk_is_named(device: Device, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("only a superuser may mount a disk here")
    try:
        (tmp_path / "file").write_bytes(b"content")
        with open_ssh(device) as transport:
            with pytest.raises(ReadOnly) as caught:
                copy_verified(transport, tmp_path / "file", f"{disk}/file", hash_file(tmp_path / "file"))
            assert caught.value.hint
            with pytest.raises(ReadOnly):
                copy_verified(transport, tmp_path / "file", f"{disk}/folder/file", "0" * 64)
    finally:
        subprocess.run(["umount", disk], check=True)
