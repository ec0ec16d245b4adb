"""Exports one graph to one file: the program of a process that exports beside others; apart.py starts it."""

import sys
from pathlib import Path
from typing import cast

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import RankshipError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quiet import silence


@record
class Failure:
    """An error for the process that waits: its class's name, its message, its hint."""

    kind: str
    message: str
    hint: str


def export_saved(graph: Path, format_: Format, file: Path, failure: Path) -> int:
    """Export a graph that `torch.export.save` wrote; returns an exit status, and writes what failed to `failure`."""
    import torch

    from rankship_pipeline.export.artifact import export_file

    try:
        export_file(torch.export.load(graph), format_, file)
    except RankshipError as error:
        said = Failure(kind=type(error).__name__, message=str(error), hint=error.hint)
        failure.write_text(encode(said), encoding="utf-8")
        return error.exit_code
    return 0


if __name__ == "__main__":
    silence()
    saved, named, *paths = sys.argv[1:]
    sys.exit(export_saved(Path(saved), cast("Format", named), *map(Path, paths)))
