"""Sphinx extension: what the site says about recipes, suites, devices and commands comes out of the code.

A page holds a line `{{ generated NAME }}`; it is replaced by what `PARTS[NAME]` writes.
"""

import contextlib
import io
import os
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline import cli
from rankship_pipeline.recipe.choices import Recipe
from rankship_targets.devices.device import Device

ROOT = Path(__file__).parent.parent
_PLACE = re.compile(r"^\{\{ generated (\w+) \}\}$", re.MULTILINE)
_KEY = re.compile(r"^(\w+): (.*(?:\n    .*)*)", re.MULTILINE)
_TOML = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
_COLUMNS = "92"
_DIRECTIVES = {
    "Functions": "autofunction:: {}",
    "Results": "autoclass:: {}\n   :members:",
    "Choices": "autoclass:: {}",
    "Errors": "autoexception:: {}",
}


def split_docstring(record: type) -> tuple[str, dict[str, str]]:
    """A record's docstring as prose, and what its section `Keys:` says of each key."""
    prose, _, keys = (getdoc(record) or "").partition("\nKeys:\n")
    unindented = re.sub(r"^    ", "", keys, flags=re.MULTILINE)
    return prose.strip(), {key: re.sub(r"\s+", " ", text) for key, text in _KEY.findall(unindented)}


def describe_type(hint: Any) -> str:  # noqa: ANN401  # a type hint may be anything
    """A key's type in the words of TOML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f'`"{word}"`' if isinstance(word, str) else f"`{word}`" for word in arguments)
    if origin in {Union, types.UnionType}:
        return " or ".join(describe_type(part) for part in arguments if part is not type(None))
    if origin is tuple:
        what = describe_type(arguments[0])
        return f"list of {what}" if "`" in what else f"list of {what}s".replace("texts", "text")
    return "table" if is_dataclass(hint) else _TOML[hint]


def describe_default(field: Field[Any]) -> str:
    """What holds where a key is left out."""
    if field.default is MISSING:
        return "required"
    if is_dataclass(field.default) or field.default is None or field.default == ():
        return "–"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    words = repr(field.default).replace("'", '"')
    return f"`[{words[1:-1].rstrip(',')}]`" if isinstance(field.default, tuple) else f"`{words}`"


def find_record(hint: Any) -> type | None:  # noqa: ANN401  # a type hint may be anything
    """The record that a key holds, alone or in a list; None for a plain value."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for part in get_args(hint) if (found := find_record(part))), None)


def write_record(heading: str, record: type, skip: frozenset[str]) -> str:
    """One record as a section: its prose, then every key with type, default and meaning."""
    prose, meanings = split_docstring(record)
    hints = get_type_hints(record)
    rows = [
        f"| `{field.name}` | {describe_type(hints[field.name])} | {describe_default(field)} |"
        + (f" {meanings.get(field.name, '')} |" if meanings else "")
        for field in fields(record)
        if f"{record.__name__}.{field.name}" not in skip
    ]
    head = [
        "| key | type | default |" + (" meaning |" if meanings else ""),
        "|---|---|---|" + ("---|" if meanings else ""),
    ]
    return "\n".join([f"### {heading}", "", prose, "", *head, *rows, ""])


def write_tables(root: type, name: str = "", skip: frozenset[str] = frozenset()) -> str:
    """A whole file: its top level (or table `name`), then every table that it may hold; a record stands once."""
    sections, waiting, seen = [], [(f"`[{name}]`" if name else "The top level", root, name)], set()
    while waiting:
        heading, record, path = waiting.pop(0)
        if record in seen:
            continue
        seen.add(record)
        sections.append(write_record(heading, record, skip))
        for key, hint in get_type_hints(record).items():
            if f"{record.__name__}.{key}" in skip or (inner := find_record(hint)) is None:
                continue
            where = f"{path}.{key}".lstrip(".")
            waiting.append((f"`[[{where}]]`" if get_origin(hint) is tuple else f"`[{where}]`", inner, where))
    return "\n".join(sections)


@cache
def read_help(*words: str) -> str:
    """What `rankship WORDS --help` prints."""
    os.environ["COLUMNS"] = _COLUMNS
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return printed.getvalue().replace(str(Path.home()), "~").strip()


def list_commands() -> Iterator[tuple[str, ...]]:
    """Every verb, and behind it what it divides into (`devices add`)."""
    for verb in sorted(cli.VERBS):
        yield (verb,)
        inner = re.search(r"\s\{?([\w-]+(?:[,|][\w-]+)+)\}?\s+\.\.\.", read_help(verb))
        for word in re.split("[,|]", inner[1]) if inner else ():
            yield (verb, word)


def write_commands() -> str:
    """Every command under its name, as `--help` explains it."""
    return "\n".join(
        f"### `rankship {' '.join(words)}`\n\n```text\n{read_help(*words)}\n```\n" for words in list_commands()
    )


def write_api() -> str:
    """The front door: its functions, what they return, and what they take besides; a note where there is none."""
    if find_spec("rankship") is None:
        return "The package `rankship` is not part of this build.\n"
    front = import_module("rankship")
    groups: dict[str, list[str]] = {"Functions": [], "Results": [], "Choices": [], "Errors": []}
    for name in sorted(front.__all__):
        if not name.startswith("_"):
            groups[find_group(getattr(front, name))].append(name)
    return "\n".join(
        f"## {group}\n\n```{{eval-rst}}\n.. currentmodule:: rankship\n\n"
        + "\n".join(f".. {_DIRECTIVES[group].format(name)}\n" for name in names)
        + "```\n"
        for group, names in groups.items()
        if names
    )


def find_group(thing: object) -> str:
    """Where a name of the front door stands on its page."""
    if not isinstance(thing, type):
        return "Functions"
    if issubclass(thing, Exception):
        return "Errors"
    return "Choices" if split_docstring(thing)[1] else "Results"


def read_document(name: str) -> str:
    """A document of the repository's root, its links as seen from the site."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\((CONTRIBUTING|CHANGELOG)\.md", lambda link: f"]({link[1].lower()}.md", text)
    return text.replace("](docs/", "](")


PARTS: dict[str, Callable[[], str]] = {
    "recipe": lambda: write_tables(Recipe, skip=frozenset({"Source.held", "DataChoice.held"})),
    "suite": lambda: write_tables(Suite),
    "device": lambda: write_tables(Device, "NAME", frozenset({"Device.name", "Device.via"})),
    "commands": write_commands,
    "api": write_api,
    "readme": lambda: read_document("README.md"),
    "contributing": lambda: read_document("CONTRIBUTING.md"),
    "changelog": lambda: read_document("CHANGELOG.md"),
}


def fill(text: str) -> str:
    """A page with its generated parts in place."""
    return _PLACE.sub(lambda place: PARTS[place[1]](), text)


def setup(app: Any) -> dict[str, bool]:  # noqa: ANN401  # Sphinx is imported by Sphinx alone
    """Connect to Sphinx: pages are filled as they are read."""

    def replace(_app: object, _page: str, source: list[str]) -> None:
        source[0] = fill(source[0])

    app.connect("source-read", replace)
    return {"parallel_read_safe": True}
