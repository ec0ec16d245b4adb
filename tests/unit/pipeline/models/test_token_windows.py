import json
from pathlib import Path

import pytest
import torch

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models import token_windows
from rankship_pipeline.models.token_windows import pack_windows, read_tokens


class Letters:
    """A tokenizer of one token a letter, and 0 for the end of a text."""

    eos_token = "."  # noqa: S105 - the end of a text

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        assert not verbose
        self.seen.append(len(text))
        return {"input_ids": [0 if one == "." else ord(one) - 96 for one in text if one != " "]}


def test_only_the_beginning_of_a_long_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abc" * 1000)
    letters = Letters()
    assert read_tokens(tmp_path / "a.txt", letters, 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert letters.seen == [24 * 7]
    monkeypatch.setattr(token_windows, "_CHARACTERS", 1)
    (tmp_path / "a.txt").write_text(8 * " " + "abc")  # many characters a token: it is read to the end
    assert read_tokens(tmp_path / "a.txt", letters, 3).tolist() == [1, 2, 3]
    assert read_tokens(tmp_path / "a.txt", letters, 9).tolist() == [1, 2, 3]


def test_json_lines_end_with_the_end_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": one, "id": 1}) for one in ("ab", "c")) + "\n")
    assert read_tokens(path, Letters(), 9).tolist() == [1, 2, 0, 3, 0]
    path.write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(InputError, match='line 2 has no "text"'):
        read_tokens(path, Letters(), 9)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"cannot read \S+a\.txt"):
        read_tokens(tmp_path / "a.txt", Letters(), 9)


def test_windows_are_whole() -> None:
    assert pack_windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert pack_windows(torch.arange(2), 3).shape == (0, 3)
