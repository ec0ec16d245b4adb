"""A host's files: fetched in parts, checked, and laid out for an errand."""

from hashlib import sha256
from pathlib import Path

import pytest

from rankship_benchmarks.rack.content import Content
from rankship_pipeline.foundation.errors import InputError, TargetError

DATA = bytes(range(256)) * 5
NAME = sha256(DATA).hexdigest()


def bring(content: Content, data: bytes, name: str = NAME, sender: str = "s") -> None:
    for offset in range(0, len(data), 500):
        content.add_part(name, sender, offset, data[offset:][:500], len(data))


def test_a_file_appears_when_it_is_whole_and_right(tmp_path: Path) -> None:
    content = Content(tmp_path / "content")
    assert content.list_missing([NAME, NAME]) == (NAME,)
    content.add_part(NAME, "other", 0, DATA[:500], len(DATA))  # broken off
    content.add_part(NAME, "s", 0, DATA[:500], len(DATA))
    content.add_part(NAME, "s", 500, DATA[500:900], len(DATA))
    assert content.list_missing([NAME]) == (NAME,)
    content.add_part(NAME, "s", 500, DATA[500:], len(DATA))  # the last part again, in full
    assert content.list_missing([NAME]) == ()
    content.lay_out({"entry/input.npy": NAME}, tmp_path / "store")
    assert (tmp_path / "store/entry/input.npy").read_bytes() == DATA


def test_an_empty_file_is_one_too(tmp_path: Path) -> None:
    content, name = Content(tmp_path), sha256(b"").hexdigest()
    content.add_part(name, "s", 0, b"", 0)
    assert content.list_missing([name]) == ()


def test_other_content_than_was_named_is_refused(tmp_path: Path) -> None:
    content = Content(tmp_path)
    with pytest.raises(TargetError, match="a file came as"):
        bring(content, DATA[::-1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_content_that_was_damaged_on_the_host_is_fetched_again(tmp_path: Path) -> None:
    content = Content(tmp_path / "content")
    bring(content, DATA)
    (path,) = [one for one in tmp_path.rglob("*") if one.is_file()]
    path.write_bytes(b"damaged")
    with pytest.raises(TargetError, match="is damaged and was removed"):
        content.lay_out({"a": NAME}, tmp_path / "store")
    assert content.list_missing([NAME]) == (NAME,)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_no_path_leads_out_of_the_store(tmp_path: Path, name: str) -> None:
    content = Content(tmp_path / "content")
    bring(content, DATA)
    with pytest.raises(InputError, match="leads out"):
        content.lay_out({name: NAME}, tmp_path / "store")


@pytest.mark.parametrize(("name", "sender"), [("../" + NAME[3:], "s"), (NAME[:-1], "s"), (NAME, "../s")])
def test_names_that_are_no_names_are_refused(tmp_path: Path, name: str, sender: str) -> None:
    with pytest.raises(InputError, match="is no"):
        bring(Content(tmp_path), DATA, name, sender)
