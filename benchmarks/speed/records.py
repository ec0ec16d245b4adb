"""The records of a measurement of speed, and their file: one row per subject and size, with every sample."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

from rankship_benchmarks.stats.estimates import median_interval
from rankship_pipeline.foundation.codec import decode, encode
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.frozen import record

Size = Literal["small", "full"]
SIZES: tuple[Size, ...] = ("small", "full")
ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "numpy")  # what computes


@record
class Figure:
    """One number of a subject: its median, every sample in order, and the 95 % interval where samples suffice.

    `effect` is the smallest relative growth that counts when two commits are compared; None: it is not compared.
    """

    name: str
    unit: str
    value: float
    samples: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    effect: float | None = None


def make_figure(name: str, unit: str, samples: Sequence[float], effect: float | None = None) -> Figure:
    """Return the figure of some samples, in the order in which they were taken."""
    low, high = median_interval(samples) or (None, None)
    kept = tuple(float(one) for one in samples)
    return Figure(name=name, unit=unit, value=float(median(kept)), samples=kept, low=low, high=high, effect=effect)


@record
class Measured:
    """What a subject gives: its figures, what it was measured on, and which peers are left out and why."""

    figures: tuple[Figure, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@record
class Row:
    """A subject measured at one size: when, at which commit, under which load.

    `stopped` says why there are no figures: the time limit, or the last line of an error.
    """

    subject: str
    size: Size
    date_utc: str
    commit: str
    load_average: float
    measured: Measured
    stopped: str | None = None


@record
class Machine:
    """What must be alike for two files of figures to be compared."""

    processor: str
    cores: int
    memory_gib: int
    threads: int
    python: str
    packages: dict[str, str]


@record
class Results:
    """All rows of one machine."""

    machine: Machine
    rows: tuple[Row, ...] = ()


def describe_machine(threads: int) -> Machine:
    """Describe this machine, with so many threads for torch and BLAS."""
    return Machine(
        processor=_read_processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        threads=threads,
        python=platform.python_version(),
        packages={name: version(name) for name in _PACKAGES},
    )


def make_row(subject: str, size: Size, measured: Measured, stopped: str | None = None) -> Row:
    """Return a row with the date, the commit and the load of now."""
    return Row(
        subject=subject,
        size=size,
        date_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=find_commit(),
        load_average=round(os.getloadavg()[0], 2),
        measured=measured,
        stopped=stopped,
    )


def find_commit() -> str:
    """Return the checkout's commit, with a plus if its code was changed since; empty outside of git."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = ask("status", "--porcelain", "--", "pipeline", "targets", "benchmarks", ":!benchmarks/baselines")
    return ask("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def read_results(path: Path) -> Results:
    """Read a file of figures; InputError if there is none or it is malformed."""
    try:
        return decode(Results, path.read_bytes(), where=str(path))
    except FileNotFoundError:
        raise InputError(f"no figures at {path}", hint="measure some: python -m speed run") from None


def write_results(path: Path, results: Results) -> None:
    """Write a file of figures, indented for diffs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain: Any = json.loads(encode(results))
    write_atomic(path, (json.dumps(plain, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def place_row(results: Results, row: Row) -> Results:
    """Return the results with one more row, in the place of an earlier one of that subject and size."""
    others = [one for one in results.rows if (one.subject, one.size) != (row.subject, row.size)]
    rows = sorted([*others, row], key=lambda one: (one.subject, SIZES.index(one.size)))
    return Results(machine=results.machine, rows=tuple(rows))


def find_row(rows: Iterable[Row], subject: str, size: Size) -> Row | None:
    """Return a subject's row at one size, None where it was not measured."""
    return next((one for one in rows if (one.subject, one.size) == (subject, size)), None)


def _read_processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
