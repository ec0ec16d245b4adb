"""One suite for every transport: what holds for one holds for all."""

import hashlib
import posixpath
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from rankship_pipeline.foundation.errors import (
    CommandFailed,
    ConnectionLost,
    InputError,
    Lacks,
    NoSpace,
    TargetTimeout,
)
from rankship_targets.transport import receiving
from rankship_targets.transport.adb.connection import open_adb
from rankship_targets.transport.copying import copy_many, copy_verified, name_part, remove_old_parts
from rankship_targets.transport.fake import COMMANDS, FakeTransport
from rankship_targets.transport.local import LocalTransport
from rankship_targets.transport.protocol import Completed, Transport, hash_many, hash_remote, run_checked
from rankship_targets.transport.receiving import receive
from rankship_targets.transport.ssh.connection import open_ssh

NASTY_NAMES = [
    "plain",
    "two words",
    "-rf",
    "--help",
    'it\'s "quoted"',
    "line\nbreak",
    "back\\slash",
    "$HOME `id` $(id) ; & | > *?[a]",
    "größe-模型-🚀",
    "trailing space ",
]


@dataclass(frozen=True)
class Bench:
    """A transport under test and a folder on its device that the test may fill."""

    transport: Transport
    folder: str
    kind: str

    def place(self, name: str) -> str:
        return posixpath.join(self.folder, name)


@pytest.fixture(params=["local", "shell", "ssh", pytest.param("adb", marks=pytest.mark.twin), "fake"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    # "shell" is a device without a Python: it hashes what lies there afterwards.
    monkeypatch.setattr(receiving, "PYTHON_FROM_BYTES", 1 << 60 if request.param == "shell" else 1 << 20)
    folder = tmp_path / "device"
    folder.mkdir()
    if request.param == "fake":
        fake = FakeTransport({"sh": _answer_script})
        fake.folders.add("/device")
        yield Bench(fake, "/device", "fake")
        return
    if request.param == "adb":
        with open_adb(request.getfixturevalue("pixel")) as transport:
            inside = f"/data/local/tmp/{secrets.token_hex(4)}"
            run_checked(transport, ["mkdir", "--", inside])
            yield Bench(transport, inside, "adb")
            run_checked(transport, ["rm", "-rf", "--", inside])
        return
    ssh = request.param == "ssh"
    with open_ssh(request.getfixturevalue("ssh_server").device) if ssh else LocalTransport() as transport:
        yield Bench(transport, str(folder), request.param)


def _answer_script(fake: FakeTransport, argv: Sequence[str]) -> Completed:
    """Say what `sh -c` would say to the scripts used below."""
    answers = {
        "exit 7": Completed(code=7, stdout="", stderr=""),
        "echo out; echo err >&2": Completed(code=0, stdout="out\n", stderr="err\n"),
        "cat; echo end": Completed(code=0, stdout="end\n", stderr=""),
        "kill -TERM $$": Completed(code=143, stdout="", stderr=""),
        "echo one; echo two; echo why >&2; exit 3": Completed(code=3, stdout="one\ntwo\n", stderr="why\n"),
        "printf 'a\\n\\nb'": Completed(code=0, stdout="a\n\nb", stderr=""),
        FLOOD: Completed(code=0, stdout="o" * FLOOD_BYTES, stderr="e" * FLOOD_BYTES),
    }
    return answers[argv[2]] if argv[2] in answers else COMMANDS["sh"](fake, argv)


FLOOD_BYTES = 5_000_000
FLOOD = f"head -c {FLOOD_BYTES} /dev/zero >&2 & head -c {FLOOD_BYTES} /dev/zero; wait"


def run(bench: Bench, *argv: str, timeout_s: float = 30) -> Completed:
    return bench.transport.run(argv, timeout_s=timeout_s)


def write(folder: Path, content: bytes = b"content", name: str = "file") -> tuple[Path, str]:
    path = folder / name
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


# Commands


def test_success_and_failure_come_back_as_codes(bench: Bench) -> None:
    assert run(bench, "true").code == 0
    assert run(bench, "false").code == 1
    assert run(bench, "sh", "-c", "exit 7").code == 7


def test_unknown_program_is_code_127(bench: Bench) -> None:
    done = run(bench, "no-such-program-anywhere")
    assert done.code == 127
    assert "no-such-program-anywhere" in done.stderr


def test_death_by_signal_is_128_and_the_signal(bench: Bench) -> None:
    assert run(bench, "sh", "-c", "kill -TERM $$").code == 143


def test_outputs_stay_apart(bench: Bench) -> None:
    done = run(bench, "sh", "-c", "echo out; echo err >&2")
    assert (done.code, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_stdin_is_empty(bench: Bench) -> None:
    assert run(bench, "sh", "-c", "cat; echo end").stdout == "end\n"


def test_megabytes_on_both_outputs_do_not_block(bench: Bench) -> None:
    done = run(bench, "sh", "-c", FLOOD, timeout_s=60)
    assert (done.code, len(done.stdout), len(done.stderr)) == (0, FLOOD_BYTES, FLOOD_BYTES)


@pytest.mark.parametrize("text", NASTY_NAMES)
def test_arguments_arrive_unchanged(bench: Bench, text: str) -> None:
    assert run(bench, "printf", "%s", text).stdout == text


def test_stream_gives_lines(bench: Bench) -> None:
    assert list(bench.transport.stream(["sh", "-c", "printf 'a\\n\\nb'"], timeout_s=30)) == ["a", "", "b"]
    assert list(bench.transport.stream(["true"], timeout_s=30)) == []


def test_stream_says_why_a_command_failed_after_its_lines(bench: Bench) -> None:
    lines = bench.transport.stream(["sh", "-c", "echo one; echo two; echo why >&2; exit 3"], timeout_s=30)
    assert [next(lines), next(lines)] == ["one", "two"]
    with pytest.raises(CommandFailed, match="status 3: why"):
        next(lines)


def test_stream_of_an_unknown_program_fails(bench: Bench) -> None:
    with pytest.raises(CommandFailed, match="127"):
        list(bench.transport.stream(["no-such-program-anywhere"], timeout_s=30))


def test_slow_command_times_out(bench: Bench) -> None:
    with pytest.raises(TargetTimeout, match="sleep"):
        run(bench, "sleep", "600", timeout_s=1)
    with pytest.raises(TargetTimeout, match="sleep"):
        list(bench.transport.stream(["sleep", "600"], timeout_s=1))
    assert run(bench, "true").code == 0


def test_timed_out_command_is_ended_with_its_children(bench: Bench) -> None:
    if bench.kind == "fake":
        pytest.skip("the fake has no processes")
    script = 'echo $$ > "$1"; sleep 600 & echo $! >> "$1"; wait'
    with pytest.raises(TargetTimeout):
        run(bench, "sh", "-c", script, "sh", bench.place("pids"), timeout_s=2)
    assert_gone(bench)


def test_left_stream_ends_its_command(bench: Bench) -> None:
    if bench.kind == "fake":
        pytest.skip("the fake has no processes")
    script = 'echo $$ > "$1"; echo ready; sleep 600 & echo $! >> "$1"; wait'
    lines = bench.transport.stream(["sh", "-c", script, "sh", bench.place("pids")], timeout_s=30)
    assert next(lines) == "ready"
    time.sleep(0.2)  # let the shell write its child's number
    lines.close()
    assert_gone(bench)


def assert_gone(bench: Bench) -> None:
    pids = run(bench, "cat", "--", bench.place("pids")).stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_is_alive(bench, pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {pids}"
        time.sleep(0.05)


def _is_alive(bench: Bench, pid: str) -> bool:
    done = run(bench, "cat", f"/proc/{pid}/stat")
    return done.code == 0 and done.stdout.rpartition(")")[2].split()[0] != "Z"


# Files


@pytest.mark.parametrize("name", NASTY_NAMES)
def test_file_travels_there_and_back(bench: Bench, tmp_path: Path, name: str) -> None:
    content = bytes(range(256)) * 100
    path, sha256 = write(tmp_path, content)
    assert copy_verified(bench.transport, path, bench.place(name), sha256)
    assert not copy_verified(bench.transport, path, bench.place(name), sha256)
    assert hash_remote(bench.transport, bench.place(name)) == sha256
    bench.transport.fetch(bench.place(name), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_empty_and_large_files_travel(bench: Bench, tmp_path: Path) -> None:
    for size in (0, 3_000_001):
        path, sha256 = write(tmp_path, b"x" * size)
        assert copy_verified(bench.transport, path, bench.place(f"f{size}"), sha256)
        bench.transport.fetch(bench.place(f"f{size}"), tmp_path / "back")
        assert (tmp_path / "back").stat().st_size == size


def test_copy_makes_the_folders_above(bench: Bench, tmp_path: Path) -> None:
    path, sha256 = write(tmp_path)
    assert copy_verified(bench.transport, path, bench.place("a b/-c/d"), sha256)
    assert run(bench, "cat", "--", bench.place("a b/-c/d")).stdout == "content"


def test_copy_replaces_other_content(bench: Bench, tmp_path: Path) -> None:
    for content in (b"old", b"new and longer"):
        path, sha256 = write(tmp_path, content)
        assert copy_verified(bench.transport, path, bench.place("file"), sha256)
    assert run(bench, "cat", "--", bench.place("file")).stdout == "new and longer"


def test_fetching_what_is_not_there_fails_and_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="absent"):
        bench.transport.fetch(bench.place("absent"), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert hash_remote(bench.transport, bench.place("absent")) is None


def test_copying_what_is_not_there_is_the_callers_mistake(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        bench.transport.feed(["cat"], tmp_path / "absent", timeout_s=30)
    with pytest.raises(InputError, match="absent"):
        copy_verified(bench.transport, tmp_path / "absent", bench.place("file"), "0" * 64)


def test_free_space_is_told_and_an_absent_folder_fails(bench: Bench) -> None:
    assert bench.transport.free_bytes(bench.folder) > 0
    with pytest.raises(CommandFailed):
        bench.transport.free_bytes(bench.place("absent"))


def test_a_command_is_fed_a_file_or_its_rest(bench: Bench, tmp_path: Path) -> None:
    if bench.kind == "fake":
        pytest.skip("the fake takes files only as copying sends them")
    content = bytes(range(256)) * 12_000
    path, _ = write(tmp_path, content)
    for offset in (0, 999_999, len(content)):
        heard: list[int] = []
        done = bench.transport.feed(["sha256sum"], path, offset=offset, timeout_s=60, on_progress=heard.append)
        assert (done.code, done.stdout.split()[0]) == (0, hashlib.sha256(content[offset:]).hexdigest())
        assert heard == sorted(heard)
        assert heard[-1:] in ([len(content)], [])


def test_a_fed_command_may_end_early_and_says_why(bench: Bench, tmp_path: Path) -> None:
    if bench.kind == "fake":
        pytest.skip("the fake takes files only as copying sends them")
    path, _ = write(tmp_path, bytes(20_000_000))
    done = bench.transport.feed(["sh", "-c", "head -c 5 >/dev/null; echo why >&2; exit 3"], path, timeout_s=60)
    assert (done.code, done.stderr) == (3, "why\n")
    assert run(bench, "true").code == 0


def test_a_fed_command_that_takes_nothing_is_ended_with_its_children(
    bench: Bench, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if bench.kind == "fake":
        pytest.skip("the fake has no processes")
    path, _ = write(tmp_path, bytes(20_000_000))
    script = 'echo $$ > "$1"; sleep 600 & echo $! >> "$1"; wait'
    with pytest.raises(TargetTimeout):
        bench.transport.feed(["sh", "-c", script, "sh", bench.place("pids")], path, timeout_s=2)
    if bench.kind != "ssh":
        assert_gone(bench)
        return
    with open_ssh(request.getfixturevalue("ssh_server").device) as again:  # the old one is cut with what was on its way
        assert_gone(replace(bench, transport=again))


def test_hashes_of_many_files_are_told_apart(bench: Bench, tmp_path: Path) -> None:
    expected = {}
    for name in NASTY_NAMES:
        path, sha256 = write(tmp_path, name.encode())
        copy_verified(bench.transport, path, bench.place(name), sha256)
        expected[bench.place(name)] = sha256
    absent = [bench.place("absent"), bench.place("ab\nsent"), bench.place("absent/below")]
    assert hash_many(bench.transport, [*expected, *absent]) == expected


def test_many_files_travel_and_only_what_changed_travels_again(bench: Bench, tmp_path: Path) -> None:
    files = {}
    for number, name in enumerate(NASTY_NAMES):
        path, sha256 = write(tmp_path, name.encode() * 10, f"file{number}")
        files[bench.place(f"kit/sub {number % 3}/{name}")] = (path, sha256)
    assert copy_many(bench.transport, files) == tuple(files)
    assert hash_many(bench.transport, list(files)) == {remote: sha256 for remote, (_, sha256) in files.items()}
    assert copy_many(bench.transport, files) == ()
    changed = bench.place("kit/sub 0/plain")
    files[changed] = write(tmp_path, b"changed", "changed")
    assert copy_many(bench.transport, files) == (changed,)
    assert run(bench, "cat", "--", changed).stdout == "changed"


LARGE = bytes(range(251)) * 12_000  # 3 MB


def test_a_broken_copy_goes_on_where_it_stopped(bench: Bench, tmp_path: Path) -> None:
    path, sha256 = write(tmp_path, LARGE)
    with pytest.raises(ConnectionLost):
        copy_verified(Faulty(bench.transport, breaks_at=2_000_000), path, bench.place("file"), sha256)
    assert hash_remote(bench.transport, bench.place("file")) is None
    offsets: list[int] = []
    heard: list[tuple[int, int]] = []
    counting = Counting(bench.transport, offsets)
    assert copy_verified(counting, path, bench.place("file"), sha256, on_progress=lambda *state: heard.append(state))
    assert offsets == [2_000_000]
    assert heard[-1] == (len(LARGE), len(LARGE))
    assert run(bench, "cat", "--", bench.place("file")).code == 0
    assert hash_remote(bench.transport, bench.place("file")) == sha256
    assert hash_remote(bench.transport, name_part(bench.place("file"), sha256)) is None


@pytest.mark.parametrize("left", [b"x" * 2_000_000, LARGE + b"more", LARGE[:-1] + b"x", b""])
def test_a_part_that_is_wrong_is_sent_anew(bench: Bench, tmp_path: Path, left: bytes) -> None:
    path, sha256 = write(tmp_path, LARGE)
    old, old_sha256 = write(tmp_path, left, "left")
    copy_verified(bench.transport, old, name_part(bench.place("file"), sha256), old_sha256)
    offsets: list[int] = []
    assert copy_verified(Counting(bench.transport, offsets), path, bench.place("file"), sha256)
    assert offsets == [0]
    assert hash_remote(bench.transport, bench.place("file")) == sha256


def test_a_whole_part_needs_only_its_name(bench: Bench, tmp_path: Path) -> None:
    path, sha256 = write(tmp_path, LARGE)
    copy_verified(bench.transport, path, name_part(bench.place("file"), sha256), sha256)
    offsets: list[int] = []
    assert copy_verified(Counting(bench.transport, offsets), path, bench.place("file"), sha256)
    assert offsets == [len(LARGE)]


def test_a_folder_in_the_files_place_is_named_and_untouched(bench: Bench, tmp_path: Path) -> None:
    if bench.kind == "fake":
        pytest.skip("the fake's mv knows no folders")
    path, sha256 = write(tmp_path)
    run(bench, "mkdir", "--", bench.place("file"))
    with pytest.raises(CommandFailed, match="Is a directory"):
        copy_verified(bench.transport, path, bench.place("file"), sha256)
    assert run(bench, "ls", "-A", "--", bench.folder).stdout == "file\n"
    assert run(bench, "ls", "-A", "--", bench.place("file")).stdout == ""


def test_only_old_parts_of_ours_are_removed(bench: Bench) -> None:
    if bench.kind == "fake":
        pytest.skip("nothing grows old in the fake")
    folder = bench.place("- a")
    run(bench, "mkdir", "--", folder)
    part = name_part(posixpath.join(folder, "model.onnx"), "0123456789abcdef" * 4)
    others = [posixpath.join(folder, name) for name in ("model.onnx", "mine.part", "x.0123.part")]
    fresh = name_part(posixpath.join(folder, "other"), "f" * 64)
    for path in (part, *others):
        assert run(bench, "touch", "-t", "200109090146", "--", path).code == 0
    assert run(bench, "touch", "--", fresh).code == 0
    remove_old_parts(bench.transport, bench.folder)
    left = run(bench, "ls", "-A", "--", folder).stdout.splitlines()
    assert set(left) == {posixpath.basename(path) for path in (*others, fresh)}


# A copy that goes wrong


@dataclass
class Counting:
    """Notes from where each file is sent and passes everything on."""

    inner: Transport
    offsets: list[int]

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        self.offsets.append(offset)
        return self.inner.feed(argv, local, offset=offset, timeout_s=timeout_s, on_progress=on_progress)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        return self.inner.run(argv, timeout_s=timeout_s)

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        return self.inner.stream(argv, timeout_s=timeout_s)

    def fetch(self, remote: str, local: Path) -> None:
        self.inner.fetch(remote, local)

    def free_bytes(self, folder: str) -> int:
        return self.inner.free_bytes(folder)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Faulty:
    """A transport that damages what it sends, breaks or has hardly any room, and otherwise passes everything on."""

    inner: Transport
    damage: bytes | None = None
    room_bytes: int | None = None
    refusal: str | None = None
    lacks_sha256sum: bool = False
    breaks_at: int | None = None

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        if self.lacks_sha256sum and argv[0] == "sha256sum":
            return Completed(code=127, stdout="", stderr="")
        return self.inner.run(argv, timeout_s=timeout_s)

    def stream(self, argv: Sequence[str], *, timeout_s: float) -> Generator[str, None, None]:
        return self.inner.stream(argv, timeout_s=timeout_s)

    def feed(
        self,
        argv: Sequence[str],
        local: Path,
        *,
        offset: int = 0,
        timeout_s: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> Completed:
        if self.damage is not None:
            local = local.with_name("damaged")
            local.write_bytes(self.damage)
        if self.breaks_at is not None:
            content, limit = local.read_bytes(), self.breaks_at
            local = local.with_name("shortened")
            local.write_bytes(content[:limit])
            self.inner.feed(argv, local, offset=offset, timeout_s=timeout_s)
            raise ConnectionLost("cable out")
        done = self.inner.feed(argv, local, offset=offset, timeout_s=timeout_s, on_progress=on_progress)
        return done if self.refusal is None else Completed(code=1, stdout="", stderr=self.refusal)

    def fetch(self, remote: str, local: Path) -> None:
        self.inner.fetch(remote, local)

    def free_bytes(self, folder: str) -> int:
        return self.inner.free_bytes(folder) if self.room_bytes is None else self.room_bytes

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def assert_old_and_nothing_else(bench: Bench) -> None:
    assert run(bench, "cat", "--", bench.place("file")).stdout == "old"
    if isinstance(bench.transport, FakeTransport):
        assert list(bench.transport.files) == ["/device/file"]
    else:
        assert run(bench, "ls", "-A", "--", bench.folder).stdout.split() == ["file"]


@pytest.fixture
def new_file(bench: Bench, tmp_path: Path) -> tuple[Path, str]:
    old, sha256 = write(tmp_path, b"old", "old")
    copy_verified(bench.transport, old, bench.place("file"), sha256)
    return write(tmp_path, b"new")


def test_damage_on_the_way_is_found_and_the_old_file_stays(bench: Bench, new_file: tuple[Path, str]) -> None:
    with pytest.raises(CommandFailed, match="did not arrive at"):
        copy_verified(Faulty(bench.transport, damage=b"neu"), new_file[0], bench.place("file"), new_file[1])
    assert_old_and_nothing_else(bench)


def test_too_little_room_is_found_before_copying(bench: Bench, new_file: tuple[Path, str]) -> None:
    with pytest.raises(NoSpace, match=r"0\.0 kB free, file needs 0\.0 kB"):
        copy_verified(Faulty(bench.transport, room_bytes=2), new_file[0], bench.place("file"), new_file[1])
    assert_old_and_nothing_else(bench)


def test_failing_last_step_leaves_no_part(bench: Bench, new_file: tuple[Path, str]) -> None:
    faulty = Faulty(bench.transport, damage=b"neu", refusal="mv broke")
    with pytest.raises(CommandFailed, match="mv broke"):
        copy_verified(faulty, new_file[0], bench.place("file"), new_file[1])
    assert_old_and_nothing_else(bench)


def test_device_without_sha256sum_lacks_something(bench: Bench, new_file: tuple[Path, str]) -> None:
    with pytest.raises(Lacks, match="sha256sum"):
        copy_verified(Faulty(bench.transport, lacks_sha256sum=True), new_file[0], bench.place("file"), new_file[1])


# What only one of them can show


def test_full_disk_while_copying_is_no_space(tmp_path: Path) -> None:
    path, sha256 = write(tmp_path, b"x" * 100_000)
    with LocalTransport() as transport, pytest.raises(NoSpace, match="No space left"):
        receive(transport, path, "/dev/full", offset=0, sha256=sha256, place=str(tmp_path / "there"))
    with FakeTransport(capacity_bytes=10) as fake, pytest.raises(NoSpace, match="No space left"):
        receive(fake, path, "file.part", offset=0, sha256=sha256, place="file")


def test_fake_fails_on_demand() -> None:
    with FakeTransport() as fake:
        fake.fail_next(CommandFailed("first"), NoSpace("second"))
        with pytest.raises(CommandFailed, match="first"):
            fake.run(["true"], timeout_s=1)
        with pytest.raises(NoSpace, match="second"):
            fake.free_bytes(".")
        assert fake.run(["true"], timeout_s=1).code == 0


def test_relative_paths_start_at_the_home_folder(tmp_path: Path) -> None:
    path, sha256 = write(tmp_path)
    with LocalTransport(home=tmp_path) as transport:
        assert copy_verified(transport, path, "a/b", sha256)
        assert transport.run([sys.executable, "-c", "print(open('a/b').read())"], timeout_s=30).stdout == "content\n"


def test_program_that_may_not_run_is_code_126(tmp_path: Path) -> None:
    with LocalTransport() as transport:
        assert transport.run([str(tmp_path)], timeout_s=30).code == 126


def test_completed_is_a_frozen_record() -> None:
    done = Completed(code=0, stdout="", stderr="")
    assert replace(done, code=1).code == 1
