import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.store import MANIFEST, Entry, Store, default_root

MADE_FROM: dict[str, object] = {"recipe": "abc", "seed": 1, "versions": {"torch": "2"}}

KILLED = """
import os, signal, sys
from pathlib import Path
from rankship_pipeline.foundation.store import Store

def make(folder: Path) -> None:
    (folder / "f").write_text("half")
    {death}

Store(Path(sys.argv[1])).produce("kind", {made_from!r}, make)
"""


def write(text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub/f").write_text(text)

    return make


def refuse(_folder: Path) -> None:
    pytest.fail("made twice")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def entry(store: Store) -> Entry:
    return store.produce("kind", MADE_FROM, write("1"))


def test_a_thing_is_made_once(store: Store, entry: Entry) -> None:
    again = store.produce("kind", dict(reversed(MADE_FROM.items())), refuse)
    assert again == entry == store.find("kind", MADE_FROM)
    assert again.read("sub/f").read_text() == "1"
    assert again.key == digest(MADE_FROM)


def test_other_ingredients_or_another_kind_make_another_folder(store: Store, entry: Entry) -> None:
    changed = store.produce("kind", {**MADE_FROM, "seed": 2}, write("2"))
    other = store.produce("other", MADE_FROM, write("3"))
    assert len({entry.folder, changed.folder, other.folder}) == 3
    assert [e.read("sub/f").read_text() for e in (entry, changed, other)] == ["1", "2", "3"]


def test_nothing_is_found_before_it_is_made(store: Store) -> None:
    assert store.find("kind", MADE_FROM) is None


def test_the_manifest_tells_what_went_in(entry: Entry) -> None:
    manifest = json.loads((entry.folder / MANIFEST).read_text())
    assert manifest["ingredients"] == MADE_FROM
    assert manifest["kind"] == "kind"
    assert list(manifest["files"]) == ["sub/f"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failed_make_leaves_nothing_and_may_be_tried_again(store: Store, kind: type[BaseException]) -> None:
    def fail(folder: Path) -> None:
        (folder / "f").write_text("half")
        raise kind

    with pytest.raises(kind):
        store.produce("kind", MADE_FROM, fail)
    assert list(store.root.iterdir()) == []
    assert store.produce("kind", MADE_FROM, write("1")).read("sub/f").read_text() == "1"


@pytest.mark.parametrize("death", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_killed_writer_leaves_nothing_readable(store: Store, death: str) -> None:
    program = KILLED.format(death=death, made_from=MADE_FROM)
    assert subprocess.run([sys.executable, "-c", program, store.root], check=False).returncode in {1, -9}
    assert store.find("kind", MADE_FROM) is None
    with pytest.raises(InputError, match="no entry matches"):
        store.match("kind", digest(MADE_FROM)[:8])
    assert store.produce("kind", MADE_FROM, write("1")).read("sub/f").read_text() == "1"


def test_of_two_makers_both_get_the_first_ones_entry(store: Store) -> None:
    def slow(folder: Path) -> None:
        store.produce("kind", MADE_FROM, write("fast"))
        (folder / "sub").mkdir()
        (folder / "sub/f").write_text("slow")

    assert store.produce("kind", MADE_FROM, slow).read("sub/f").read_text() == "fast"


@pytest.mark.parametrize("content", [b"2", b"", b"11"])
def test_a_changed_or_cut_file_is_refused(entry: Entry, content: bytes) -> None:
    (entry.folder / "sub/f").write_bytes(content)
    with pytest.raises(BuildError, match="changed or cut short") as caught:
        entry.read("sub/f")
    assert str(entry.folder) in caught.value.hint


def test_a_deleted_file_is_refused(entry: Entry) -> None:
    (entry.folder / "sub/f").unlink()
    with pytest.raises(BuildError, match="changed or cut short"):
        entry.read("sub/f")


def test_a_file_that_was_never_there_is_refused(entry: Entry) -> None:
    with pytest.raises(BuildError, match="holds no stranger"):
        entry.read("stranger")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"key": "x"}'])
def test_an_unreadable_manifest_is_refused(store: Store, entry: Entry, content: str) -> None:
    (entry.folder / MANIFEST).write_text(content)
    with pytest.raises(BuildError, match="no readable manifest"):
        store.find("kind", MADE_FROM)


def test_a_missing_manifest_is_refused(store: Store, entry: Entry) -> None:
    (entry.folder / MANIFEST).unlink()
    with pytest.raises(BuildError, match="no readable manifest"):
        store.produce("kind", MADE_FROM, refuse)


@pytest.mark.parametrize("length", [1, 12, 20, 21, 64])
def test_a_prefix_of_any_length_finds_the_entry(store: Store, entry: Entry, length: int) -> None:
    store.produce("other", MADE_FROM, write("2"))
    assert store.match("kind", entry.key[:length]) == entry


def test_a_longer_key_that_differs_at_its_end_matches_nothing(store: Store, entry: Entry) -> None:
    wrong = entry.key[:-1] + ("0" if entry.key[-1] != "0" else "1")
    with pytest.raises(InputError, match="no entry matches"):
        store.match("kind", wrong)


@pytest.mark.parametrize("prefix", ["", "*", "zzzz", "../kind", "a/b"])
def test_a_prefix_that_matches_nothing_is_refused(store: Store, entry: Entry, prefix: str) -> None:
    assert entry.folder.is_dir()
    with pytest.raises(InputError, match="no entry matches"):
        store.match("kind", prefix)


def test_a_prefix_that_matches_several_says_how_many(store: Store) -> None:
    keys = [store.produce("kind", {"n": n}, write(str(n))).key for n in range(17)]  # 17 keys, 16 first letters
    letter = next(k[0] for k in keys if sum(other[0] == k[0] for other in keys) > 1)
    with pytest.raises(InputError, match=f"{sum(k[0] == letter for k in keys)} entries match kind '{letter}'"):
        store.match("kind", letter)


def test_the_stores_place_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKSHIP_STORE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "rankship/store"
    monkeypatch.setenv("RANKSHIP_STORE", "/elsewhere")
    assert default_root() == Path("/elsewhere")
    monkeypatch.delenv("RANKSHIP_STORE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache/rankship/store"


def test_content_follows_the_files_and_not_what_they_were_made_from(store: Store, entry: Entry) -> None:
    twin = store.produce("kind", {"n": 1}, write("1"))
    other = store.produce("kind", {"n": 2}, write("2"))
    assert twin.content == entry.content != other.content


def test_a_discarded_entry_is_gone_and_may_be_made_again(store: Store, entry: Entry) -> None:
    store.discard(entry)
    assert list(store.root.iterdir()) == []
    assert store.produce("kind", MADE_FROM, write("again")).read("sub/f").read_text() == "again"


def test_sweeping_removes_old_leftovers_only(store: Store, entry: Entry) -> None:
    old, young = store.root / ".kind-1.a.tmp", store.root / ".kind-1.b.tmp"
    for folder in (old, young):
        folder.mkdir()
        (folder / "f").write_text("half")
    os.utime(old, (0, 0))
    store.sweep()
    assert sorted(store.root.iterdir()) == [young, entry.folder]


def test_sweeping_bears_a_leftover_that_vanishes_meanwhile(store: Store, entry: Entry) -> None:
    (store.root / ".kind-1.c.tmp").symlink_to("nowhere")  # found by name, gone when it is asked for its age
    store.sweep()
    assert entry.folder.is_dir()
