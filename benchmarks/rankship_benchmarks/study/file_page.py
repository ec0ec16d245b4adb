"""The table of a study's files for the terminal, and their page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rankship_benchmarks.report import words
from rankship_benchmarks.study.file_lines import FileLine
from rankship_benchmarks.study.page import PAGE, SUMMARY, join_conditions, render
from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.units import show_bytes


def print_files(lines: Sequence[FileLine], console: Console) -> None:
    """Print one table per model."""
    for subject in dict.fromkeys(line.subject for line in lines):
        mine = [line for line in lines if line.subject == subject]
        headings = ("asked", "weights", "file", "smaller", "quality", "range", "latency", "CPU seconds")
        table = start_table(f"{subject}: dense {mine[0].dense:.2f} {mine[0].unit}", "format", *headings)
        for line in mine:
            table.add_row(
                escape(f"→ {line.name}" if line.ours else line.name),
                line.format,
                words.UNKNOWN if line.smaller is None else f"{line.smaller:g} ×",
                words.show_size(line.weight_bytes),
                show_bytes(line.size_bytes),
                f"{line.ratio:.2f} ×",
                f"{line.quality:.2f}",
                f"{line.low:.2f}–{line.high:.2f}",
                words.show_time(line.latency_ns),
                f"{line.cpu_seconds:.0f}",
            )
        console.print(table)


@record
class FileSummary:
    """The table for comparison with later ones: every line without its cells, and the cells' conditions."""

    name: str
    lines: tuple[FileLine, ...]
    conditions: dict[str, str]


def write_files(name: str, lines: Sequence[FileLine], folder: Path) -> Path:
    """Write the table as JSON and the page beside the files; returns the page's path."""
    from rankship_benchmarks.study import file_charts

    conditions = join_conditions([cell for line in lines for cell in line.cells])
    kept = FileSummary(name=name, lines=tuple(replace(line, cells=()) for line in lines), conditions=conditions)
    write_atomic(folder / SUMMARY, encode(kept).encode() + b"\n")
    sections = []
    for subject in dict.fromkeys(line.subject for line in lines):
        mine = [line for line in lines if line.subject == subject]
        plans = [line for line in mine if line.ours and line.cells[0].plan]
        layers = [line.cells[0].plan.layers for line in plans if line.cells[0].plan]
        sections.append(
            {
                "subject": subject,
                "lines": mine,
                "timed": any(line.latency_ns for line in mine),
                "bytes": file_charts.draw_against_bytes(mine),
                "latency": file_charts.draw_against_latency(mine),
                "plans": plans,
                "stored": list(zip(*layers, strict=True)),
            }
        )
    write_atomic(folder / PAGE, render("files.html.j2", name, sections, conditions).encode())
    return folder / PAGE
