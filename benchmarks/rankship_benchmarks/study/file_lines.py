"""The table of a study's files: all seeds of one row at one size in one line."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from rankship_benchmarks.stats.estimates import Estimate
from rankship_benchmarks.study.files import FileCell
from rankship_benchmarks.study.lines import find_unit, read_quality
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record


@record
class FileLine:
    """One row of a table. Quality is in `unit`; `low` and `high` are its range over seeds, or the one file's interval.

    Bytes, parameters and latency are those of the first seed's file, `precision` its type of fewest bits; `cpu_seconds`
    and `peak_bytes` are the largest over seeds. What a toolchain does not say is None.
    """

    subject: str
    name: str
    ours: bool
    format: Format
    precision: Precision
    smaller: float | None
    unit: str
    quality: float
    low: float
    high: float
    dense: float
    seeds: int
    weight_bytes: int | None
    size_bytes: int
    dense_bytes: int
    parameters: int | None
    latency_ns: Estimate | None
    cpu_seconds: float
    peak_bytes: int
    cells: tuple[FileCell, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the dense float32 one of its format."""
        return self.dense_bytes / self.size_bytes


def summarise_files(cells: Iterable[FileCell], latency_ns: Mapping[str, Estimate]) -> list[FileLine]:
    """Group cells by model, row and size, in the study's order; `latency_ns` is by the files' SHA-256."""
    groups: dict[tuple[str, str, float | None], list[FileCell]] = {}
    for cell in cells:
        groups.setdefault((cell.subject, cell.row, cell.smaller), []).append(cell)
    return [_summarise(group, latency_ns) for group in groups.values()]


def _summarise(group: Sequence[FileCell], latency_ns: Mapping[str, Estimate]) -> FileLine:
    first = group[0]
    values = [read_quality(cell, cell.accuracy) for cell in group]
    low, high = min(values), max(values)
    if len(group) == 1 and first.accuracy.low is not None and first.accuracy.high is not None:
        low, high = sorted(first.accuracy.measure.scale(one) for one in (first.accuracy.low, first.accuracy.high))
    return FileLine(
        subject=first.subject,
        name=first.row,
        ours=first.ours,
        format=first.format,
        precision=first.precision,
        smaller=first.smaller,
        unit=find_unit(first),
        quality=mean(values),
        low=low,
        high=high,
        dense=mean(read_quality(cell, cell.dense) for cell in group),
        seeds=len(group),
        weight_bytes=first.weight_bytes,
        size_bytes=first.size_bytes,
        dense_bytes=first.dense_bytes,
        parameters=first.plan.total_parameters if first.plan else None,
        latency_ns=latency_ns.get(first.sha256),
        cpu_seconds=max(cell.cpu_seconds for cell in group),
        peak_bytes=max(cell.peak_bytes for cell in group),
        cells=tuple(group),
    )
