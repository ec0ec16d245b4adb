"""Copies that break, disks that fill up, and how few commands many files take."""

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankship_pipeline.foundation.errors import (
    CommandFailed,
    ConnectionLost,
    InputError,
    NoSpace,
    ReadOnly,
    TargetError,
    TargetTimeout,
)
from rankship_targets.devices.device import Device
from rankship_targets.transport import receiving
from rankship_targets.transport.copying import copy_many, copy_verified, name_part
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import Completed, Transport, explain_failure, hash_many, hash_remote
from rankship_targets.transport.ssh.connection import SshTransport, open_ssh

MEGABYTE = 1_000_000


def write(path: Path, content: bytes) -> tuple[Path, str]:
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


@pytest.fixture
def kit(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    return {f"kit/lib/part {n:03}": write(tmp_path / f"f{n}", str(n).encode()) for n in range(100)}


def count(fake: FakeTransport) -> dict[str, int]:
    names = [call[0] for call in fake.calls]
    fake.calls.clear()
    return {name: names.count(name) for name in sorted(set(names))}


def test_an_unchanged_kit_takes_one_command(kit: dict[str, tuple[Path, str]]) -> None:
    with FakeTransport() as fake:
        assert len(copy_many(fake, kit)) == 100
        assert count(fake) == {"feed": 100, "free_bytes": 1, "mkdir": 1, "sha256sum": 1}
        assert copy_many(fake, kit) == ()
        assert count(fake) == {"sha256sum": 1}


def test_commands_stay_short_enough_for_every_shell(tmp_path: Path) -> None:
    local, sha256 = write(tmp_path / "file", b"x")
    files = {f"kit/{n:04}{'é' * 100}": (local, sha256) for n in range(1000)}
    with FakeTransport() as fake:
        assert len(copy_many(fake, files)) == 1000
        assert copy_many(fake, files) == ()
        assert max(sum(len(word.encode()) + 3 for word in call) for call in fake.calls) < 20_000


def test_nothing_to_copy_is_nothing_to_do() -> None:
    with FakeTransport() as fake:
        assert copy_many(fake, {}) == ()
        assert fake.calls == []


def test_an_absent_file_is_found_before_anything_is_sent(tmp_path: Path, kit: dict[str, tuple[Path, str]]) -> None:
    with FakeTransport() as fake, pytest.raises(InputError, match="nowhere"):
        copy_many(fake, {**kit, "kit/more": (tmp_path / "nowhere", "0" * 64)})
    assert fake.calls == []


def test_progress_is_told_of_large_copies_only(tmp_path: Path) -> None:
    small, large = write(tmp_path / "s", b"s" * MEGABYTE), write(tmp_path / "l", b"l" * 3 * MEGABYTE)
    heard: list[tuple[int, int]] = []
    with FakeTransport() as fake:
        copy_many(fake, {"small": small}, on_progress=lambda *state: heard.append(state))
        assert heard == []
        copy_many(fake, {"small": small, "large": large}, on_progress=lambda *state: heard.append(state))
    assert heard == [(3 * MEGABYTE, 3 * MEGABYTE)]


class Meddled(FakeTransport):
    """Does something to the device before each file that was sent to it gets its name."""

    def __init__(self, meddle: Callable[["Meddled", str], None]) -> None:
        super().__init__()
        self.sent: list[str] = []
        self._meddle = meddle

    def _give_name(self, part: str, sha256: str, place: str) -> Completed:
        self.sent.append(part)
        self._meddle(self, part)
        return super()._give_name(part, sha256, place)


def test_two_hosts_that_send_the_same_file_both_succeed(tmp_path: Path) -> None:
    local, sha256 = write(tmp_path / "file", b"content")

    def rename(device: Meddled, remote: str) -> None:
        device.files["place"] = device.files.pop(remote)  # the other host gives our part its name

    with Meddled(rename) as fake:
        assert copy_verified(fake, local, "place", sha256)
        assert fake.files == {"place": b"content"}


def test_a_part_that_was_damaged_once_is_sent_again(tmp_path: Path) -> None:
    local, sha256 = write(tmp_path / "file", b"content")

    def damage_first(device: Meddled, remote: str) -> None:
        if len(device.sent) == 1:
            device.files[remote] = b"c0ntent"

    with Meddled(damage_first) as fake:
        assert copy_verified(fake, local, "place", sha256)
        assert fake.sent == [name_part("place", sha256)] * 2
        assert fake.files == {"place": b"content"}


@pytest.mark.parametrize(
    ("failure", "stays"),
    [
        (ConnectionLost("cable"), True),
        (TargetTimeout("slow"), True),
        (NoSpace("full"), False),
        (ReadOnly("worn"), False),
    ],
)
def test_a_broken_link_leaves_the_part_and_a_refusal_does_not(
    tmp_path: Path, failure: TargetError, *, stays: bool
) -> None:
    local, sha256 = write(tmp_path / "file", b"x" * 2 * MEGABYTE)

    def fail(*_: object) -> None:
        raise failure

    with Meddled(fail) as fake, pytest.raises(type(failure)):
        copy_verified(fake, local, "place", sha256)
    assert (name_part("place", sha256) in fake.files) is stays


def test_a_device_too_full_for_the_rest_keeps_no_part(tmp_path: Path) -> None:
    local, sha256 = write(tmp_path / "file", b"x" * 3 * MEGABYTE)
    with FakeTransport(capacity_bytes=2 * MEGABYTE) as fake:
        fake.files[name_part("place", sha256)] = b"x" * MEGABYTE
        with pytest.raises(NoSpace, match=r"1\.00 MB free, file needs 2\.00 MB"):
            copy_verified(fake, local, "place", sha256)
        assert fake.files == {}


def test_a_rest_that_fits_beside_its_beginning_is_sent(tmp_path: Path) -> None:
    local, sha256 = write(tmp_path / "file", b"x" * 3 * MEGABYTE)
    with FakeTransport(capacity_bytes=4 * MEGABYTE) as fake:
        fake.files[name_part("place", sha256)] = b"x" * 2 * MEGABYTE
        assert copy_verified(fake, local, "place", sha256)


def test_names_of_parts_fit_into_a_file_system(tmp_path: Path) -> None:
    name = name_part("folder/" + "模" * 85, "0123456789abcdef" * 4).split("/")[1]
    assert len(name.encode()) <= 255
    (tmp_path / name).write_text("")


def test_refusals_are_named_by_the_devices_own_words() -> None:
    for words, kind in {
        "mkdir: cannot create directory 'a': Read-only file system": ReadOnly,
        "cat: write error: No space left on device": NoSpace,
        "cp: error writing 'a': Disk quota exceeded": NoSpace,
        "mv: cannot move: Permission denied": CommandFailed,
    }.items():
        assert type(explain_failure(["x"], 1, words)) is kind


@pytest.mark.parametrize("said", ["garbage\n", "0" * 63 + "  a\n", "0" * 64 + "  other\n", "", "\n\n"])
def test_another_sha256sum_than_expected_is_an_error_and_no_hash(said: str) -> None:
    with FakeTransport({"sha256sum": lambda _, __: Completed(code=0, stdout=said, stderr="")}) as fake:
        with pytest.raises(CommandFailed, match="sha256sum on the device printed"):
            hash_many(fake, ["a", "b"])
        if "other" not in said:  # alone, the name is not read
            with pytest.raises(CommandFailed, match="sha256sum on the device printed"):
                hash_remote(fake, "a")


def test_a_killed_sha256sum_is_an_error_and_no_absent_file() -> None:
    with (
        FakeTransport({"sha256sum": lambda _, __: Completed(code=137, stdout="", stderr="")}) as fake,
        pytest.raises(CommandFailed, match="signal 9"),
    ):
        hash_remote(fake, "a")


# Over a real server


class WatchedSsh(SshTransport):
    """Notes from where each file is sent, and does something to the way once a copy has come so far."""

    def __init__(self, device: Device, after_bytes: int = 1 << 60, meddle: Callable[[], object] = str) -> None:
        super().__init__(device)
        self.offsets: list[int] = []
        self._after_bytes, self._meddle = after_bytes, meddle

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        def watch(sent: int) -> None:
            if sent >= self._after_bytes:
                self._meddle()
            if on_progress:
                on_progress(sent)

        self.offsets.append(offset)
        return super().feed(argv, local, offset=offset, timeout_s=timeout_s, on_progress=watch)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return write(tmp_path_factory.mktemp("large") / "model", os.urandom(30 * MEGABYTE))


def kill_sessions(server: psutil.Process, name: str = "sshd") -> None:
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(name):
                process.kill()


def assert_resumed(device: Device, large: tuple[Path, str], place: str) -> None:
    with WatchedSsh(device) as transport:
        assert copy_verified(transport, large[0], place, large[1])
        assert len(transport.offsets) == 1
        assert 0 < transport.offsets[0] < 30 * MEGABYTE
        assert hash_remote(transport, place) == large[1]
    assert [path.name for path in Path(place).parent.iterdir()] == [Path(place).name]


@pytest.mark.parametrize("python", [True, False])
@pytest.mark.parametrize("victim", ["sshd", "receiver"])
def test_a_device_side_killed_on_the_way_is_a_lost_connection_and_resumed(
    start_sshd: Callable[..., Any],
    large: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    victim: str,
    python: bool,
) -> None:
    if not python:
        monkeypatch.setattr(receiving, "PYTHON_FROM_BYTES", 1 << 60)
    names = {"sshd": "sshd", "receiver": "python" if python else "cat"}
    running = start_sshd()
    place, process = str(tmp_path / "device/model"), psutil.Process(running.process.pid)
    with WatchedSsh(running.device, 15 * MEGABYTE, lambda: kill_sessions(process, names[victim])) as transport:
        with pytest.raises(ConnectionLost):
            copy_verified(transport, large[0], place, large[1])
        assert not Path(place).exists()
    assert_resumed(running.device, large, place)


def test_a_part_of_another_file_is_not_built_upon(
    request: pytest.FixtureRequest, large: tuple[Path, str], tmp_path: Path
) -> None:
    place = str(tmp_path / "device/model")
    Path(place).parent.mkdir()
    Path(name_part(place, large[1])).write_bytes(b"x" * 20 * MEGABYTE)
    with WatchedSsh(request.getfixturevalue("ssh_server").device) as transport:
        assert copy_verified(transport, large[0], place, large[1])
        assert transport.offsets == [0]
    assert Path(place).read_bytes() == large[0].read_bytes()


# A disk of their own for the sessions, which nobody outside the server's mount namespace sees.
MOUNT = 'mount -t tmpfs -o "$1" rankship "$0" && shift && exec "$@"'


@pytest.fixture
def start_with_disk(start_sshd: Callable[..., Any], tmp_path: Path) -> Callable[[str], tuple[SshTransport, str]]:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can give a server a disk of its own")
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = subprocess.run(["unshare", "-m", "sh", "-c", MOUNT, folder, "size=1m", "true"], check=False)
    if tried.returncode != 0:
        pytest.skip("mounting is not allowed here")

    def start(options: str) -> tuple[SshTransport, str]:
        server = start_sshd(prefix=["unshare", "-m", "sh", "-c", MOUNT, str(folder), options])
        return open_ssh(server.device), str(folder)

    return start


def list_files(transport: Transport, folder: str) -> list[str]:
    return transport.run(["ls", "-A", "--", folder], timeout_s=30).stdout.split()


def test_a_full_disk_is_no_space_and_keeps_no_part(
    start_with_disk: Callable[[str], tuple[SshTransport, str]],
    large: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transport, folder = start_with_disk("size=8m")
    with transport:
        with pytest.raises(NoSpace, match=r"free, model needs 30\.00 MB"):
            copy_verified(transport, large[0], f"{folder}/model", large[1])
        monkeypatch.setattr(transport, "free_bytes", lambda _: 1 << 40)  # it fills up while the copy runs
        with pytest.raises(NoSpace, match="No space left on device"):
            copy_verified(transport, large[0], f"{folder}/model", large[1])
        assert list_files(transport, folder) == []


def test_a_read_only_disk_is_named(
    start_with_disk: Callable[[str], tuple[SshTransport, str]], large: tuple[Path, str]
) -> None:
    transport, folder = start_with_disk("ro")
    with transport:
        with pytest.raises(ReadOnly, match="Read-only file system"):
            copy_verified(transport, large[0], f"{folder}/new/model", large[1])
        with pytest.raises(ReadOnly, match="Read-only file system"):
            copy_verified(transport, large[0], f"{folder}/model", large[1])
        assert transport.run(["true"], timeout_s=30).code == 0


def test_a_disk_without_inodes_is_no_space(
    start_with_disk: Callable[[str], tuple[SshTransport, str]], large: tuple[Path, str]
) -> None:
    transport, folder = start_with_disk("size=64m,nr_inodes=2")
    with transport:
        transport.run(["touch", "--", f"{folder}/last"], timeout_s=30)
        with pytest.raises(NoSpace, match="No space left on device"):
            copy_verified(transport, large[0], f"{folder}/model", large[1])
        assert list_files(transport, folder) == ["last"]
