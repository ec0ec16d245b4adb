"""A text as windows of tokens, packed one behind the other without padding."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError

_CHARACTERS = 24  # read first for each token that is wanted: of a corpus of gigabytes only the beginning counts


def read_tokens(path: Path, tokenizer: Any, wanted: int) -> Tensor:  # noqa: ANN401 - transformers has no types
    """The token numbers (tokens,), int64, of the beginning of a text, as many as `wanted` where it has them.

    Of a .jsonl file they are those of each line's "text", with the tokenizer's end of text behind each. No special
    tokens are added.
    """
    lines = _read_documents(path, tokenizer.eos_token or "\n") if path.suffix.lower() == ".jsonl" else None
    for limit in (_CHARACTERS * wanted, None):
        text = read_beginning(path, limit) if lines is None else lines[:limit]
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted or len(text) < (limit or 0):
            break
    return torch.tensor(ids[:wanted], dtype=torch.int64)


def check_tokens(tokens: Tensor, vocabulary: int, model: str) -> None:
    """Check that a model knows all of a text's tokens; InputError if its tokenizer is another model's."""
    most = int(tokens.max()) if len(tokens) else 0
    if most >= vocabulary:
        raise InputError(
            f"the tokenizer of {model} makes tokens up to {most}, the model knows {vocabulary}",
            hint="put the model's own tokenizer into its folder",
        )


def pack_windows(tokens: Tensor, length: int) -> Tensor:
    """As many whole windows (samples, length) as the tokens (tokens,) make."""
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def read_beginning(path: Path, characters: int | None) -> str:
    """At most so many characters of a text, None for all; InputError where it is none."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return stream.read(characters)
    except (OSError, UnicodeDecodeError) as failure:
        raise InputError(f"cannot read {path}: {failure}", hint="give a UTF-8 text file") from None


def _read_documents(path: Path, end: str) -> str:
    documents = []
    for number, line in enumerate(read_beginning(path, None).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str):
            raise InputError(f'{path}, line {number} has no "text"', hint='write {"text": "…"} on every line')
        documents.append(found)
    return "".join(document + end for document in documents)
