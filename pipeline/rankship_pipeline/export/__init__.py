"""Exports one torch.export graph to one file per format, and reads the file back.

An exporter is a module with two functions; foundation/formats.py names the module of each format:

    export_graph(graph: ExportedProgram, path: Path, axes: Axes = ()) -> None    write the file
    list_operators(path: Path) -> tuple[Operator, ...]          read every operator with a constant weight

`axes` are the axes of each input that may vary in the graph, for a format that names them.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.formats import FACTS, Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.units import show_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from rankship_pipeline.export.shapes import Axes

_FLOAT_BYTES = 4  # every file is float32


@record
class Operator:
    """One operator with a constant weight, seen as a matrix: `rows` out, `columns` in·kh·kw."""

    kind: str
    rows: int
    columns: int


@record
class Expected:
    """What a graph says of the operators in its file: `needed` must be in it, more than `allowed` must not."""

    needed: tuple[Operator, ...]
    allowed: tuple[Operator, ...]


class Exporter(Protocol):
    """The functions of a format's module."""

    def export_graph(self, graph: "ExportedProgram", path: Path, axes: "Axes" = ()) -> None:
        """Write the file; UnsupportedOp if an operator cannot be lowered."""

    def list_operators(self, path: Path) -> tuple[Operator, ...]:
        """Read every linear or convolutional operator back from the file."""


def load_exporter(format_name: Format) -> Exporter:
    """Import a format's module; InputError with what to install if its toolchain is missing."""
    try:
        return cast("Exporter", importlib.import_module(FACTS[format_name].exporter))
    except ImportError as failure:
        raise InputError(
            f"cannot export {format_name}: {failure}",
            hint=f"pip install '{FACTS[format_name].extra}', or leave {format_name} out of export.formats",
        ) from failure


def check_size(tensors: "Iterable[Tensor]", format_name: Format) -> None:
    """Check that a format's files can hold these tensors, each counted once; InputError names the limit."""
    limit = FACTS[format_name].limit_bytes
    sizes = {
        (one.data_ptr(), one.shape): one.numel() * (_FLOAT_BYTES if one.is_floating_point() else one.element_size())
        for one in tensors
    }
    total = sum(sizes.values())
    if limit is not None and total > limit:
        raise InputError(
            f"the weights take {show_bytes(total)}, a file of {format_name} holds at most {show_bytes(limit)}",
            hint=f"leave {format_name} out of export.formats; executorch has no such limit",
        )


def check_factors(plan: RankPlan, expected: Expected, found: tuple[Operator, ...], *, where: str) -> None:
    """Check that every factored layer is still a chain of operators in the file; BuildError lists those that are not.

    Each factor's shape must occur as often as the graph needs it, and no dense shape of a factored layer more often
    than the graph allows.
    """
    wanted, allowed, present = (
        Counter((one.rows, one.columns) for one in side) for side in (expected.needed, expected.allowed, found)
    )
    complaints = []
    for layer in plan.layers:
        if layer.factors is None:
            continue
        complaints += [
            f"{layer.name}: {present[shape]} operators of shape {shape[0]}x{shape[1]}, {wanted[shape]} expected"
            for shape in dict.fromkeys(layer.operators)
            if present[shape] < wanted[shape]
        ]
        undivided = (layer.rows, layer.columns)
        if present[undivided] > allowed[undivided]:
            complaints.append(f"{layer.name}: one dense operator in the file, {undivided[0]}x{undivided[1]}")
    if complaints:
        raise BuildError(
            f"{where}: factored layers are not stored as their factors:\n  " + "\n  ".join(complaints),
            hint="the exporter multiplied the factors out; try another version of it",
        )


@contextmanager
def keep_stdout_clean() -> Iterator[None]:
    """Hide exporters' output to stdout and stderr, also from C++; shown on stderr if the export fails."""
    import os
    import tempfile

    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
            if failed:
                noise.seek(0)
                sys.stderr.write(noise.read().decode(errors="replace")[-4000:])
