"""Exporters: one torch.export graph in, one file per format out, and the file read back.

An exporter is a module of two functions, found in the literal table `EXPORTERS`:

    export_graph(graph: ExportedProgram, path: Path) -> None      write the file
    list_operators(path: Path) -> tuple[Operator, ...]            read back every operator with a constant weight
"""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from rankship_pipeline.errors import BuildError, InputError
from rankship_pipeline.records import Format, RankPlan, record

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# format → (module, file suffix, what to install)
EXPORTERS: dict[Format, tuple[str, str, str]] = {
    "onnx": ("rankship_pipeline.export.onnx", "onnx", "rankship[onnx]"),
    "tflite": ("rankship_pipeline.export.tflite", "tflite", "rankship[tflite]"),
    "executorch": ("rankship_pipeline.export.executorch", "pte", "rankship[executorch]"),
}


@record
class Operator:
    """One operator with a constant weight, seen as a matrix: `rows` out, `columns` in·kh·kw."""

    kind: str
    rows: int
    columns: int


class Exporter(Protocol):
    """The seam: what a format's module offers."""

    def export_graph(self, graph: "ExportedProgram", path: Path) -> None:
        """Write the file; UnsupportedOp where an operator cannot be lowered."""

    def list_operators(self, path: Path) -> tuple[Operator, ...]:
        """Read every linear or convolutional operator back from the file."""


def load_exporter(format_name: Format) -> Exporter:
    """Import a format's module; a missing toolchain is an InputError that says what to install."""
    module, _, extra = EXPORTERS[format_name]
    try:
        return cast("Exporter", importlib.import_module(module))
    except ImportError as failure:
        raise InputError(
            f"cannot export {format_name}: {failure}",
            hint=f"pip install '{extra}', or leave {format_name} out of export.formats",
        ) from failure


def check_factors(plan: RankPlan, operators: tuple[Operator, ...], *, where: str) -> None:
    """Prove that every factored layer still is two operators in the file; BuildError lists those that are not.

    Looks for both factors' shapes among the file's operators (as often as the plan has them), and that no operator
    of the undivided shape is left over beyond the layers that stayed dense.
    """
    found = Counter((operator.rows, operator.columns) for operator in operators)
    wanted: Counter[tuple[int, int]] = Counter()
    complaints = []
    for layer in plan.layers:
        if layer.rank is None:
            wanted[layer.rows, layer.columns] += 1
            continue
        for shape in ((layer.rank, layer.columns), (layer.rows, layer.rank)):
            wanted[shape] += 1
            if found[shape] < wanted[shape]:
                complaints.append(f"{layer.name}: no operator of shape {shape[0]}x{shape[1]}")
    factored_shapes = {(layer.rows, layer.columns) for layer in plan.layers if layer.rank is not None}
    complaints += [
        f"{found[shape]} undivided operators of shape {shape[0]}x{shape[1]}, {wanted[shape]} expected"
        for shape in sorted(factored_shapes)
        if found[shape] > wanted[shape]
    ]
    if complaints:
        raise BuildError(
            f"{where}: factored layers are not two operators any more:\n  " + "\n  ".join(complaints),
            hint="the exporter folded the factors back; try another version of it",
        )


@contextmanager
def keep_stdout_clean() -> Iterator[None]:
    """Send what exporters print, also from C++, away from both standard streams; shown again if the export fails."""
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
