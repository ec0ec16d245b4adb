"""Texts with or without labels, as the token numbers that a Hugging Face model takes."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.csv_file import find_label, pick_text_column, read_rows
from rankship_pipeline.models.model_config import load_tokenizer, read_config
from rankship_pipeline.models.samples import Samples, find_path
from rankship_pipeline.recipe.choices import DataChoice, Recipe

_TASKS = ("sequence-classification", "text-generation", "feature-extraction", "fill-mask", "token-classification")
TOKENS = 128  # unless the model takes fewer
Texts = list[str]
Labels = list[str] | None


def open_texts(recipe: Recipe, folder: Path) -> Samples:
    """The texts of `data.text`, or of a column of `data.csv`."""
    choice, source = recipe.data, recipe.models[0]
    if source.task not in _TASKS:
        raise InputError(
            f"{choice.origin}: model {source.name!r} is for {source.task}, which lines of text do not serve",
            hint=f"give a model for {', '.join(_TASKS)}; or a loader",
        )
    texts, labels = read_texts(choice, folder)
    labels = labels if source.task == "sequence-classification" else None  # a label of a text is a class of all of it
    return Samples(len(texts), None if labels is None else tuple(labels), partial(_tokenise, recipe, folder, texts))


def read_texts(choice: DataChoice, folder: Path) -> tuple[Texts, Labels]:
    """The texts, and their labels where there are some; InputError where there is no text."""
    path = find_path(choice.text or str(choice.csv), folder)
    reader = READERS.get(path.suffix.lower(), _read_lines if choice.csv is None else _read_table)
    texts, labels = reader(path, choice)
    if not texts:
        raise InputError(f"{choice.origin}: no text in {path}", hint="write one text a line")
    return texts, labels


def _read_lines(path: Path, choice: DataChoice) -> tuple[Texts, Labels]:
    """One text a line; or label, tab, text on every line."""
    if choice.label is not None or choice.columns:
        key = "columns" if choice.columns else "label"
        raise InputError(
            f"{choice.origin}: {path} has lines, no columns for `{key}` to name",
            hint="leave `label` and `columns` out; or name the table with csv = …",
        )
    lines = [(number, line) for number, line in _read_split(path, choice) if line.strip()]
    labelled = [number for number, line in lines if "\t" in line]
    if not labelled:
        return [line for _, line in lines], None
    if len(labelled) < len(lines):
        bare = next(number for number, line in lines if "\t" not in line)
        raise InputError(
            f"{choice.origin}: line {labelled[0]} of {path} has a tab (label, tab, text), line {bare} has none",
            hint="write a label before every text, or before none",
        )
    pairs = [line.split("\t", 1) for _, line in lines]
    return [text for _, text in pairs], [label.strip() for label, _ in pairs]


def _read_table(path: Path, choice: DataChoice) -> tuple[Texts, Labels]:
    """The text column of a table with a heading, and its labels where it has them."""
    names, rows = read_rows(path, choice)
    return _take_columns(names, rows, path, choice)


def _read_json_lines(path: Path, choice: DataChoice) -> tuple[Texts, Labels]:
    """One JSON object a line."""
    rows: list[dict[str, str]] = []
    for number, line in _read_split(path, choice):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as failure:
            raise InputError(f"{path}, line {number}: {failure}", hint="write one JSON object a line") from None
        if not isinstance(found, dict):
            raise InputError(f"{path}, line {number} is no JSON object", hint='write {"text": …, "label": …}')
        rows.append({str(key): value if isinstance(value, str) else json.dumps(value) for key, value in found.items()})
    names = tuple(rows[0]) if rows else ()
    for number, row in enumerate(rows, 1):
        if set(row) != set(names):
            raise InputError(
                f"{path}, object {number} has {', '.join(row)}, the first has {', '.join(names)}",
                hint="give every object the same keys",
            )
    return _take_columns(names, rows, path, choice)


READERS: dict[str, Callable[[Path, DataChoice], tuple[Texts, Labels]]] = {
    ".csv": _read_table,
    ".jsonl": _read_json_lines,
}


def _take_columns(
    names: Sequence[str], rows: Sequence[dict[str, str]], path: Path, choice: DataChoice
) -> tuple[Texts, Labels]:
    column = pick_text_column(names, path, choice)
    label = find_label(names, path, choice)
    return [row[column] for row in rows], None if label is None else [row[label].strip() for row in rows]


def _read_split(path: Path, choice: DataChoice) -> list[tuple[int, str]]:
    """The lines with their numbers; what else may end a line (form feed, U+2028) stays inside a text."""
    return list(enumerate(read_whole(path, choice).split("\n"), 1))  # reading made \r\n one \n


def read_whole(path: Path, choice: DataChoice) -> str:
    """A whole file; InputError where it is no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as failure:
        raise InputError(f"{choice.origin}: cannot read {path}: {failure}", hint="give a UTF-8 text file") from None


def _tokenise(recipe: Recipe, folder: Path, texts: Texts, chosen: Sequence[int]) -> tuple[Tensor, ...]:
    """The chosen texts as the tensors that `inputs` names, each (samples, tokens), padded or cut to one length."""
    source = recipe.models[0]
    tokenizer = load_tokenizer(source, folder)
    most = min(tokenizer.model_max_length, read_config(source, folder).get("max_position_embeddings") or TOKENS)
    length = recipe.data.tokens or min(TOKENS, most)
    if length > most:
        raise InputError(
            f"data.tokens is {length}, model {source.name!r} takes at most {most}", hint=f"set tokens = {most} or less"
        )
    if tokenizer.pad_token is None:
        raise InputError(
            f"model {source.name!r}: its tokenizer has no padding token", hint="set pad_token and save it again"
        )
    wanted = list(source.inputs)
    made = tokenizer(
        [texts[index] for index in chosen],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    missing = [name for name in wanted if name not in made]
    if missing:
        raise InputError(
            f"model {source.name!r}: its tokenizer makes {', '.join(made)}, not {', '.join(missing)}",
            hint="leave `inputs` out of [[models]]: they are then what the tokenizer makes",
        )
    return tuple(made[name].to(torch.int64) for name in wanted)
