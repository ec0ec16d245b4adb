"""A study's table in the terminal and its page: quality against size, what each layer keeps, every number's spread."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.markup import escape

from rankship_benchmarks.report.page import read_style
from rankship_benchmarks.study.study import Cell
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import Accuracy, record
from rankship_pipeline.foundation.tables import start_table
from rankship_pipeline.foundation.units import show_bytes, show_count

PAGE, SUMMARY = "study.html", "summary.json"


@record
class Line:
    """One row of a table: all seeds of one way at one budget. Quality is in `unit`; `low`, `high` are its range.

    Over one seed the range is the test set's own 95 % interval. `dense` is the merged model's quality before it was
    compressed; `tasks` and `specialists` are percent by task, where a study merges. `cpu_seconds` and `peak_bytes` are
    the largest seen.
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
    """Group cells by model, budget and way, in the order in which they were asked for."""
    groups: dict[tuple[str, float, str, float], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.subject, cell.kept, cell.row, cell.refine_cpu_seconds), []).append(cell)
    return [_summarise(group) for group in groups.values()]


def _summarise(group: Sequence[Cell]) -> Line:
    first = group[0]
    values = [_read_quality(cell, cell.accuracy) for cell in group]
    interval = (min(values), max(values))
    if len(group) == 1 and _unit(first) == "%":
        interval = (100 * first.accuracy.low, 100 * first.accuracy.high)
    layers = first.plan
    return Line(
        subject=first.subject,
        kept=first.kept,
        name=first.row + (" + refined" if first.refine_cpu_seconds else ""),
        ours=first.ours,
        refined=bool(first.refine_cpu_seconds),
        unit=_unit(first),
        quality=mean(values),
        low=interval[0],
        high=interval[1],
        dense=mean(_read_quality(cell, cell.dense) for cell in group),
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


def _average_by_stage(seeds: Sequence[Sequence[Accuracy]]) -> dict[str, float]:
    """Percent right by stage, over the seeds; `seeds` name the same stages."""
    return {same[0].stage: 100 * mean(one.value for one in same) for same in zip(*seeds, strict=True)}


def _unit(cell: Cell) -> str:
    """Perplexity for language models, whose answers are tokens; percent of right answers for classifiers."""
    return "perplexity" if cell.language else "%"


def _read_quality(cell: Cell, accuracy: Accuracy) -> float:
    if cell.language:
        return exp(accuracy.cross_entropy or 0.0)
    return 100 * accuracy.value


def print_cells(cells: Iterable[Cell], console: Console) -> None:
    """One table per model."""
    lines = summarise_cells(cells)
    for subject in dict.fromkeys(line.subject for line in lines):
        mine = [line for line in lines if line.subject == subject]
        table = start_table(
            f"{subject}: dense {mine[0].dense:.2f} {mine[0].unit}",
            "kept",
            "quality",
            "range",
            "parameters",
            "unspent",
            "CPU seconds",
        )
        for line in mine:
            table.add_row(
                escape(f"→ {line.name}" if line.ours else line.name),
                f"{line.kept:.3f}",
                f"{line.quality:.2f}",
                f"{line.low:.2f}–{line.high:.2f}",
                show_count(line.parameters),
                show_count(line.budget - line.parameters),
                f"{line.cpu_seconds:.0f}",
            )
        console.print(table)


@record
class Summary:
    """A study's table as it is kept and compared: every line without its cells, and the conditions they share."""

    name: str
    lines: tuple[Line, ...]
    conditions: dict[str, str]


def write_summary(name: str, cells: Sequence[Cell], folder: Path) -> Path:
    """Write the table as JSON beside the cells; returns its path."""
    lines = tuple(replace(line, cells=()) for line in summarise_cells(cells))
    path = folder / SUMMARY
    write_atomic(path, encode(Summary(name=name, lines=lines, conditions=_join_conditions(cells))).encode() + b"\n")
    return path


def write_page(name: str, cells: Sequence[Cell], folder: Path) -> Path:
    """Draw the page beside the cells; returns its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from rankship_benchmarks.study import charts as study_charts

    lines = summarise_cells(cells)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    sections = []
    for subject in dict.fromkeys(line.subject for line in lines):
        mine = [line for line in lines if line.subject == subject]
        chosen = [line for line in mine if line.ours and not line.refined]
        sections.append(
            {
                "subject": subject,
                "lines": mine,
                "specialists": mean(mine[0].specialists.values()) if mine[0].specialists else None,
                "quality": study_charts.draw_quality(mine),
                "layers": study_charts.draw_layers(chosen) if chosen else "",
                "errors": study_charts.draw_errors(chosen) if chosen else "",
            }
        )
    page = environment.get_template("page.html.j2").render(
        name=name,
        sections=sections,
        conditions=_join_conditions(cells),
        show_count=show_count,
        show_bytes=show_bytes,
        style=read_style(),
    )
    path = folder / PAGE
    write_atomic(path, page.encode())
    return path


def _join_conditions(cells: Sequence[Cell]) -> dict[str, str]:
    """Every condition with all values it had."""
    names = dict.fromkeys(key for cell in cells for key in cell.conditions)
    return {key: ", ".join(sorted({cell.conditions.get(key, "–") for cell in cells})) for key in names}
