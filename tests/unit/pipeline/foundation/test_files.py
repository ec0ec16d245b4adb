import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable, hash_file, publish_folder, write_atomic

Blow = Callable[..., None]
STRIKES: list[type[BaseException]] = [RuntimeError, OSError, KeyboardInterrupt]


def strike(kind: type[BaseException]) -> Blow:
    def blow(*_arguments: object, **_named: object) -> None:
        raise kind

    return blow


def test_a_files_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one chunk
    (tmp_path / "f").write_bytes(content)
    assert hash_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a/b/c"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["c"]


@pytest.mark.parametrize("kind", STRIKES)
@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_cut_short_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, kind: type[BaseException]
) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")
    monkeypatch.setattr(moment, strike(kind))
    with pytest.raises(kind):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_published_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep/final"
    with publish_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/f").write_text("1")
        assert not final.exists()
    assert (final / "sub/f").read_text() == "1"
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("kind", STRIKES)
def test_a_folder_whose_making_fails_never_appears(tmp_path: Path, kind: type[BaseException]) -> None:
    def fill() -> None:
        with publish_folder(tmp_path / "final") as folder:
            (folder / "f").write_text("half")
            raise kind

    with pytest.raises(kind):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", STRIKES)
@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.rename"])
def test_a_folder_whose_publishing_fails_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(moment, strike(kind))
    with pytest.raises(kind), publish_folder(tmp_path / "final") as folder:
        (folder / "f").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_of_two_publishers_the_first_stays(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with publish_folder(final) as slow:
        (slow / "f").write_text("slow")
        with publish_folder(final) as fast:
            assert fast != slow
            (fast / "f").write_text("fast")
    assert (final / "f").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [final]


def test_a_file_in_the_way_is_not_mistaken_for_anothers_folder(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("mine")
    with pytest.raises(OSError, match="Not a directory"), publish_folder(tmp_path / "final") as folder:
        (folder / "f").write_text("1")
    assert (tmp_path / "final").read_text() == "mine"


def test_files_are_flushed_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []

    def watch(handle: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{handle}").readlink().name, (tmp_path / "final").exists()))

    monkeypatch.setattr(os, "fsync", watch)
    with publish_folder(tmp_path / "final") as folder:
        (folder / "f").write_text("1")
    assert flushed[0] == ("f", False)
    assert flushed[-1] == (tmp_path.name, True)  # the rename itself


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "a/b", "--store")
    assert list((tmp_path / "a/b").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match=f"cannot write to {tmp_path}/a/b: Not a directory") as caught:
        ensure_writable(tmp_path / "a/b", "--store")
    assert "--store" in caught.value.hint
