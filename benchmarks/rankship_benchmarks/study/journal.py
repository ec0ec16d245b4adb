"""A study's finished cells: one JSON line each, so that an interrupted study computes only what is missing."""

from pathlib import Path
from typing import TypeVar

from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.files import write_atomic

T = TypeVar("T")


def read_lines(kind: type[T], path: Path) -> list[T]:
    """Read all complete lines; a partial last line of an interruption is left out."""
    if not path.is_file():
        return []
    return [decode(kind, line, where=str(path)) for line in path.read_bytes().split(b"\n")[:-1] if line]


def append_line(cell: object, path: Path) -> None:
    """Append one cell."""
    with path.open("ab") as stream:
        stream.write(encode(cell).encode() + b"\n")


def cut_torn_line(path: Path) -> None:
    """Cut off the partial last line of a killed writer, so that the next line starts clean."""
    if path.is_file():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            write_atomic(path, whole[:end])
