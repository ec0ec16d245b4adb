"""A table with a heading: numeric features for a model of tables, or a column of texts."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.samples import Samples, find_path
from rankship_pipeline.recipe.choices import DataChoice, Recipe

TEXT, LABEL = "text", "label"  # the columns of texts and labels, where the recipe names none


def open_table(recipe: Recipe, folder: Path) -> Samples:
    """The rows of `data.csv` as features (float32) in the order of its columns."""
    choice = recipe.data
    path = find_path(str(choice.csv), folder)
    names, lines = _read_numbered(path, choice)
    rows = [row for _, row in lines]
    label = find_label(names, path, choice)
    features = choice.columns or tuple(name for name in names if name != label)
    missing = [name for name in features if name not in names]
    if missing:
        raise _lacks(path, missing, names)
    if not rows or not features:
        raise InputError(f"{choice.origin}: {path} has no {'features' if rows else 'rows'}", hint="see docs, [data]")
    table = [[_read_number(row[name], path, line, name) for name in features] for line, row in lines]
    labels = None if label is None else tuple(row[label].strip() for row in rows)
    return Samples(len(rows), labels, partial(_take, recipe, torch.tensor(table, dtype=torch.float32)))


def _take(recipe: Recipe, table: Tensor, chosen: Sequence[int]) -> tuple[Tensor, ...]:
    rows = table[list(chosen)]
    normalise = recipe.data.normalise
    if normalise is None:
        return (rows,)
    if len(normalise.mean) not in {1, rows.shape[1]}:
        raise InputError(
            f"{recipe.data.origin}: normalise has {len(normalise.mean)} means for {rows.shape[1]} features",
            hint="give one mean and one std, or one of each for every feature",
        )
    return ((rows - torch.tensor(normalise.mean)) / torch.tensor(normalise.std),)


def read_rows(path: Path, choice: DataChoice) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """A table's column names and its rows; every row is as long as the heading."""
    names, lines = _read_numbered(path, choice)
    return names, [row for _, row in lines]


def _read_numbered(path: Path, choice: DataChoice) -> tuple[tuple[str, ...], list[tuple[int, dict[str, str]]]]:
    """A table's column names, and its rows with the line of the file on which each ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = [(reader.line_num, row) for reader in [csv.reader(stream)] for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as failure:
        raise InputError(f"{choice.origin}: cannot read {path}: {failure}", hint="give a UTF-8 .csv file") from None
    if not lines:
        raise InputError(f"{choice.origin}: {path} is empty", hint="give a table with a heading")
    names = tuple(name.strip() for name in lines[0][1])
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise InputError(f"{path}: two columns are called {double[0]!r}", hint="give every column its own name")
    for number, row in lines[1:]:
        if len(row) != len(names):
            raise InputError(
                f"{path}, line {number}: {len(row)} values under {len(names)} names", hint="correct that line"
            )
    return names, [(number, dict(zip(names, row, strict=True))) for number, row in lines[1:]]


def find_label(names: Sequence[str], path: Path, choice: DataChoice) -> str | None:
    """The column of labels: as the recipe names it; else "label"; None where there is none."""
    if choice.label is not None and choice.label not in names:
        raise _lacks(path, [choice.label], names)
    return choice.label or (LABEL if LABEL in names else None)


def pick_text_column(names: Sequence[str], path: Path, choice: DataChoice) -> str:
    """The column of texts: as the recipe names it; else "text"; else the only one besides the labels."""
    label = find_label(names, path, choice)
    others = [name for name in names if name != label]
    column = choice.columns[0] if choice.columns else TEXT if TEXT in names else others[0] if others else TEXT
    if column not in names:
        raise _lacks(path, [column], names)
    if len(choice.columns) > 1 or (not choice.columns and column != TEXT and len(others) > 1):
        raise InputError(
            f"{path}: which column holds the texts? It has {', '.join(names)}",
            hint='name one: columns = ["…"] in [data]',
        )
    return column


def _lacks(path: Path, missing: Sequence[str], names: Sequence[str]) -> InputError:
    return InputError(
        f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(names)}",
        hint="correct `label` or `columns` in [data]",
    )


def _read_number(text: str, path: Path, line: int, column: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"{path}, line {line}, column {column!r}: {text!r} is no number",
            hint="write numbers, fill in what is missing, or leave the column out: columns = […] in [data]",
        ) from None
