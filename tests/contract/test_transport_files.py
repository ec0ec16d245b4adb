"""What holds for files over every transport: whole, resumed, or not there at all."""

import hashlib
import posixpath
from dataclasses import replace
from pathlib import Path

import pytest

from make.transports import NASTY_NAMES, Bench, Counting, Faulty, assert_gone, needs_real, run, write
from rankship_pipeline.foundation.errors import (
    CommandFailed,
    ConnectionLost,
    InputError,
    Lacks,
    NoSpace,
    TargetTimeout,
)
from rankship_targets.transport.copying import copy_many, copy_verified, name_part, remove_old_parts
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import hash_many, hash_remote
from rankship_targets.transport.ssh.connection import open_ssh


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


@needs_real  # the fake takes files only as copying sends them
def test_a_command_is_fed_a_file_or_its_rest(bench: Bench, tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000
    path, _ = write(tmp_path, content)
    for offset in (0, 999_999, len(content)):
        heard: list[int] = []
        done = bench.transport.feed(["sha256sum"], path, offset=offset, timeout_s=60, on_progress=heard.append)
        assert (done.code, done.stdout.split()[0]) == (0, hashlib.sha256(content[offset:]).hexdigest())
        assert heard == sorted(heard)
        assert heard[-1:] in ([len(content)], [])


@needs_real  # the fake takes files only as copying sends them
def test_a_fed_command_may_end_early_and_says_why(bench: Bench, tmp_path: Path) -> None:
    path, _ = write(tmp_path, bytes(20_000_000))
    done = bench.transport.feed(["sh", "-c", "head -c 5 >/dev/null; echo why >&2; exit 3"], path, timeout_s=60)
    assert (done.code, done.stderr) == (3, "why\n")
    assert run(bench, "true").code == 0


@needs_real  # the fake has no processes
def test_a_fed_command_that_takes_nothing_is_ended_with_its_children(
    bench: Bench, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
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


@needs_real  # the fake's mv knows no folders
def test_a_folder_in_the_files_place_is_named_and_untouched(bench: Bench, tmp_path: Path) -> None:
    path, sha256 = write(tmp_path)
    run(bench, "mkdir", "--", bench.place("file"))
    with pytest.raises(CommandFailed, match="Is a directory"):
        copy_verified(bench.transport, path, bench.place("file"), sha256)
    assert run(bench, "ls", "-A", "--", bench.folder).stdout == "file\n"
    assert run(bench, "ls", "-A", "--", bench.place("file")).stdout == ""


@needs_real  # nothing grows old in the fake
def test_only_old_parts_of_ours_are_removed(bench: Bench) -> None:
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
