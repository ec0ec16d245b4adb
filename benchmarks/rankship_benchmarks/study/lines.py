"""A study's table: all seeds of one method at one budget in one line."""

from collections.abc import Iterable, Sequence
from math import exp
from statistics import mean

from rankship_benchmarks.study.files import FileCell
from rankship_benchmarks.study.study import Cell
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.quality import Score


@record
class Line:
    """One row of a table: all seeds of one method at one budget. Quality is in `unit`; `low`, `high` are its range.

    With one seed the range is the test set's 95 % interval. `dense` is the merged model's quality before it was
    compressed; `tasks` and `specialists` are per cent by task, if the study merges. `cpu_seconds` and `peak_bytes` are
    the largest over seeds.
    """

    subject: str
    kept: float
    name: str
    ours: bool
    refined: bool
    unit: str
    quality: float
    low: float
    high: float
    dense: float
    seeds: int
    parameters: int
    budget: int
    of_layers: float
    size_bytes: int
    cpu_seconds: float
    peak_bytes: int
    cells: tuple[Cell, ...]
    tasks: dict[str, float]
    specialists: dict[str, float]


def summarise_cells(cells: Iterable[Cell]) -> list[Line]:
    """Group cells by model, budget and method, in the study's order."""
    groups: dict[tuple[str, float, str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.subject, cell.kept, cell.row, cell.refine_cpu_seconds), []).append(cell)
    return [_summarise(group) for group in groups.values()]


def _summarise(group: Sequence[Cell]) -> Line:
    first = group[0]
    values = [read_quality(cell, cell.accuracy) for cell in group]
    interval = (min(values), max(values))
    low, high = first.accuracy.low, first.accuracy.high
    if len(group) == 1 and find_unit(first) == "%" and low is not None and high is not None:
        interval = (100 * low, 100 * high)
    layers = first.plan
    return Line(
        subject=first.subject,
        kept=first.kept,
        name=first.row + (" + refined" if first.refine_cpu_seconds else ""),
        ours=first.ours,
        refined=bool(first.refine_cpu_seconds),
        unit=find_unit(first),
        quality=mean(values),
        low=interval[0],
        high=interval[1],
        dense=mean(read_quality(cell, cell.dense) for cell in group),
        seeds=len(group),
        parameters=max(cell.plan.total_parameters for cell in group),
        budget=first.plan.budget_cost,
        of_layers=sum(one.chosen_parameters for one in layers.layers)
        / sum(one.dense_parameters for one in layers.layers),
        size_bytes=first.size_bytes,
        cpu_seconds=max(cell.cpu_seconds for cell in group),
        peak_bytes=max(cell.peak_bytes for cell in group),
        cells=tuple(group),
        tasks=_average_by_stage([cell.tasks for cell in group]),
        specialists=_average_by_stage([cell.specialists for cell in group]),
    )


def _average_by_stage(seeds: Sequence[Sequence[Score]]) -> dict[str, float]:
    """Return the mean accuracy in per cent by stage, over the seeds, which must have the same stages."""
    return {same[0].stage: 100 * mean(one.value for one in same) for same in zip(*seeds, strict=True)}


def find_unit(cell: Cell | FileCell) -> str:
    """Return the unit of quality: perplexity for language models, per cent of right answers for classifiers."""
    return "perplexity" if cell.language else cell.accuracy.measure.unit or cell.accuracy.measure.name


def read_quality(cell: Cell | FileCell, accuracy: Score) -> float:
    """Return a score of a cell in the unit of its quality."""
    if cell.language:
        return exp(accuracy.cross_entropy or 0.0)
    return accuracy.measure.scale(accuracy.value)
