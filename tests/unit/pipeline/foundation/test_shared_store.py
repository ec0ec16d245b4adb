"""A store that machines share: what one made another has, and half an entry is none."""

from pathlib import Path

import fsspec
import pytest

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.shared_store import VARIABLE, SharedStore, find_shared
from rankship_pipeline.foundation.store import MANIFEST, Store

MADE_FROM: dict[str, object] = {"recipe": "abc"}


def write(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/f").write_text("made")


def refuse(_folder: Path) -> None:
    pytest.fail("made twice")


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, and a store of objects without folders."""
    return f"file://{tmp_path}/share" if request.param == "file" else f"memory://{tmp_path.name}"


def make_store(tmp_path: Path, name: str, address: str) -> Store:
    return Store(tmp_path / name, SharedStore(address))


def test_what_one_machine_made_another_has(tmp_path: Path, address: str) -> None:
    first, second = (make_store(tmp_path, name, address) for name in ("first", "second"))
    assert second.find("kind", MADE_FROM) is None
    made = first.produce("kind", MADE_FROM, write)
    found = second.produce("kind", MADE_FROM, refuse)
    assert found.content == made.content
    assert found.read("sub/f").read_text() == "made"
    third = make_store(tmp_path, "third", address)
    assert third.holds(f"{made.folder.name}/sub/f")
    assert not third.holds("other-123/f")


def test_half_an_entry_is_none_and_is_made_and_sent_again(tmp_path: Path, address: str) -> None:
    first, second = (make_store(tmp_path, name, address) for name in ("first", "second"))
    made = first.produce("kind", MADE_FROM, write)
    files, root = fsspec.core.url_to_fs(address)
    files.pipe_file(f"{root}/{made.folder.name}/sub/f", b"of another machine, whose manifest is to come")
    assert second.find("kind", MADE_FROM) is None
    assert not list((tmp_path / "second").glob("*"))
    second.discard(second.produce("kind", MADE_FROM, write))
    assert not files.exists(f"{root}/{made.folder.name}")
    files.makedirs(f"{root}/{made.folder.name}/sub", exist_ok=True)
    files.pipe_file(f"{root}/{made.folder.name}/sub/f", b"made")
    assert second.find("kind", MADE_FROM) is None, "no manifest"


def test_a_manifest_names_no_file_outside_its_entry(tmp_path: Path, address: str) -> None:
    made = make_store(tmp_path, "first", address).produce("kind", MADE_FROM, write)
    files, root = fsspec.core.url_to_fs(address)
    place = f"{root}/{made.folder.name}/{MANIFEST}"
    files.pipe_file(place, files.cat_file(place).replace(b"sub/f", b"../../f"))
    with pytest.raises(InputError, match=r"names the file '../../f', outside its folder"):
        make_store(tmp_path, "second", address).find("kind", MADE_FROM)


def test_an_address_that_cannot_be_used_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "nonsense://bucket")
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match="RANKSHIP_SHARED_STORE=nonsense://bucket cannot be used: ValueError"):
        store.find("kind", MADE_FROM)
    monkeypatch.delenv(VARIABLE)
    assert find_shared() is None
    assert Store(tmp_path / "store").find("kind", MADE_FROM) is None
