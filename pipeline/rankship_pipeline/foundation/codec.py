"""Encodes records as canonical JSON and decodes them; the only way in which text becomes a record.

Files of release 0.1 can be read too: where a field is missing, FORMER makes it from the old field.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from rankship_pipeline.foundation.artifact_key import head_of
from rankship_pipeline.foundation.errors import InputError

T = TypeVar("T")
_BEGINNING_BYTES = 4096  # of a file in which no character is 0


_ADAPTERS: dict[type[Any], Any] = {}


def _adapter(cls: type[Any]) -> Any:  # noqa: ANN401 - pydantic's TypeAdapter, imported late: `--help` stays quick
    from pydantic import ConfigDict, TypeAdapter

    if cls not in _ADAPTERS:  # a record has its own configuration; plain values must not turn NaN into null
        config = None if is_dataclass(cls) else ConfigDict(ser_json_inf_nan="constants")
        _ADAPTERS[cls] = TypeAdapter(cls, config=config)
    return _ADAPTERS[cls]


def encode(thing: object) -> str:
    """Canonical JSON: keys sorted, no spaces, NaN and infinity refused."""
    plain = _adapter(type(thing)).dump_python(thing, mode="json")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def to_plain(record: object, *, without_defaults: bool) -> dict[str, Any]:
    """A record as dictionaries, lists, texts and numbers, keys in the record's order; None is left out."""
    adapter = _adapter(type(record))
    plain: dict[str, Any] = adapter.dump_python(
        record, mode="json", exclude_none=True, exclude_defaults=without_defaults
    )
    return plain


def digest(thing: object) -> str:
    """SHA-256 (hex) of a record's or plain value's canonical JSON."""
    return hashlib.sha256(encode(thing).encode()).hexdigest()


def decode(cls: type[T], text: str | bytes, *, where: str) -> T:
    """Parse strictly: unknown keys and wrong types raise InputError with `where`, the field and the nearest key."""
    from pydantic import ValidationError

    adapter = _adapter(cls)
    try:
        result: T = adapter.validate_json(text)
    except ValidationError as first:
        try:
            result = adapter.validate_json(_renew(text, [one["loc"] for one in first.errors()]))
        except ValidationError as failure:
            message = f"{where}: " + "; ".join(_explain(cls, dict(error)) for error in failure.errors())
            raise InputError(message, hint="correct the keys named above and run again") from None
    return result


def _make_key(old: dict[str, Any]) -> dict[str, Any]:
    """Make the key of a release 0.1 artifact, always float32 on the default delegate; removes the old fields."""
    key = {name: old[name] for name in ("variant", "format")}
    task = {name: old.pop(name, None) for name in (*key, "task")}["task"]
    return key if task is None else {**key, "part": head_of(task)}


# new field → function that makes it from an old record's table and removes the old fields; KeyError: not an old record
FORMER: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "key": _make_key,
    "verdict": lambda old: old.pop("word"),
    "value": lambda old: old["correct"] / old["samples"],  # of a score, when accuracy was the only measure
}


def _renew(text: str | bytes, wrong: Sequence[tuple[int | str, ...]]) -> str | bytes:
    """Rewrite a file's text in today's form; returned unchanged if none of the `wrong` fields has an old form."""
    known = [path for path in wrong if path and path[-1] in FORMER]
    if not known:
        return text
    whole = json.loads(text)
    for *path, name in known:
        with suppress(KeyError, IndexError, TypeError):  # not an old record but a wrong one: the field stays missing
            table = reduce(getitem, path, whole)
            if name not in table:
                table[name] = FORMER[str(name)](table)
    return json.dumps(whole)


def read_toml(
    cls: type[T], path: Path, kind: str, expand: Callable[[dict[str, Any]], dict[str, Any]] = lambda table: table
) -> T:
    """Read one TOML file as a record; InputError with the path and its `kind` if it is unreadable or malformed.

    `expand` writes out what the file may abbreviate.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no {kind} at {path}", hint=f"give the path of a {kind}.toml") from None
    except OSError as failure:
        raise InputError(f"cannot read {path}: {failure.strerror}", hint=f"give the path of a {kind}.toml") from None
    table = parse_toml(decode_text(data, str(path)), str(path))
    return decode(cls, json.dumps(expand(table), default=str), where=str(path))


def decode_text(data: bytes, where: str) -> str:
    """Return a text file's text without its byte order mark; InputError for what is not UTF-8, such as UTF-16."""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:_BEGINNING_BYTES]
    save = "save it as UTF-8 (in Notepad: Save as, Encoding UTF-8; in PowerShell: Set-Content -Encoding utf8)"
    if wide:
        raise InputError(f"{where} is not valid TOML: it is UTF-16 or UTF-32, expected UTF-8", hint=save)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        found = f"the byte 0x{data[failure.start]:02x} in line {line} is not UTF-8"
        raise InputError(f"{where} is not valid TOML: {found}", hint=save) from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Return a TOML text's tables; InputError that names the line if it is malformed."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as failure:
        raise InputError(f"{where} is not valid TOML: {failure}", hint="correct the file at that line") from None
    except RecursionError:
        raise InputError(f"{where} is not valid TOML: it is nested too deeply", hint="correct the file") from None


def _explain(cls: type[Any], error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] not in {"unexpected_keyword_argument", "extra_forbidden"}:
        said = error["msg"][:1].lower() + error["msg"][1:]  # what may be copied from it keeps its letters: 'mA'
        return f"{place}: {said} (got {_shorten(error['input'])})"
    nearest = difflib.get_close_matches(str(error["loc"][-1]), _keys(cls), n=1)
    if nearest == [error["loc"][-1]]:
        return f"unknown key {place!r}: {nearest[0]!r} belongs in another table of the file"
    return f"unknown key {place!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "")


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _keys(cls: type[Any]) -> list[str]:
    """All property names in the record's schema, for "did you mean"."""
    schema = _adapter(cls).json_schema()
    blocks = [schema, *schema.get("$defs", {}).values()]
    return sorted({key for block in blocks for key in block.get("properties", {})})
