"""A study's table for the terminal, and its page: quality against size, what each layer keeps, every number's range."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.markup import escape

from rankship_benchmarks.report import words
from rankship_benchmarks.report.page import read_style
from rankship_benchmarks.study.files import FileCell
from rankship_benchmarks.study.lines import Line, summarise_cells
from rankship_benchmarks.study.study import Cell
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_bytes, show_count

PAGE, SUMMARY = "study.html", "summary.json"


def print_cells(cells: Iterable[Cell], console: Console) -> None:
    """Print one table per model."""
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
    """A study's table for comparison with later ones: every line without its cells, and the cells' conditions."""

    name: str
    lines: tuple[Line, ...]
    conditions: dict[str, str]


def write_summary(name: str, cells: Sequence[Cell], folder: Path) -> Path:
    """Write the table as JSON beside the cells; returns its path."""
    lines = tuple(replace(line, cells=()) for line in summarise_cells(cells))
    path = folder / SUMMARY
    write_atomic(path, encode(Summary(name=name, lines=lines, conditions=join_conditions(cells))).encode() + b"\n")
    return path


def write_page(name: str, cells: Sequence[Cell], folder: Path) -> Path:
    """Draw the page beside the cells; returns its path."""
    from rankship_benchmarks.study import charts as study_charts

    lines = summarise_cells(cells)
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
    path = folder / PAGE
    write_atomic(path, render("page.html.j2", name, sections, join_conditions(cells)).encode())
    return path


def render(template: str, name: str, sections: Sequence[Mapping[str, object]], conditions: Mapping[str, str]) -> str:
    """Fill a page's template; every text is escaped, only the charts are markup."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(
        name=name,
        sections=sections,
        conditions=conditions,
        show_count=show_count,
        show_bytes=show_bytes,
        words=words,
        style=read_style(),
    )


def join_conditions(cells: Sequence[Cell] | Sequence[FileCell]) -> dict[str, str]:
    """Return every condition with all its values over the cells."""
    names = dict.fromkeys(key for cell in cells for key in cell.conditions)
    return {key: ", ".join(sorted({cell.conditions.get(key, "–") for cell in cells})) for key in names}
