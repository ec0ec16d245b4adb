"""A fake exporter: writes the graph's weighted operators as JSON, for fast tests of the code around exporters."""

from pathlib import Path

from torch.export import ExportedProgram

from rankship_pipeline.export import Operator
from rankship_pipeline.export.graph import expect_operators
from rankship_pipeline.export.shapes import Axes
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.frozen import record


@record
class _Listing:
    operators: tuple[Operator, ...]


def export_graph(graph: ExportedProgram, path: Path, _axes: Axes = ()) -> None:
    """Write every operator's matrix."""
    path.write_text(encode(_Listing(operators=expect_operators(graph).needed)), encoding="utf-8")


def list_operators(path: Path) -> tuple[Operator, ...]:
    """Read the operators from the file."""
    return decode(_Listing, path.read_bytes(), where=str(path)).operators
