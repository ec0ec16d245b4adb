"""Runs cases, each in processes of its own under a time limit, and keeps every finished row at once."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rankship_pipeline.foundation.codec import decode
from rankship_pipeline.foundation.errors import InputError
from speed.judge import refuse_unlike
from speed.records import (
    Figure,
    Measured,
    Results,
    Row,
    Size,
    describe_machine,
    find_commit,
    find_row,
    make_figure,
    make_row,
    place_row,
    read_results,
    write_results,
)
from speed.subjects import SUBJECTS

THREADS: dict[Size, int] = {"small": 1, "full": os.cpu_count() or 1}
PROCESSES: dict[Size, int] = {"small": 2, "full": 1}  # of one row; two show how far processes differ


def run_cases(
    subjects: Sequence[str], size: Size, out: Path, say: Callable[[str], None], *, again: bool = False
) -> Results:
    """Measure subjects at one size; rows of this commit that `out` has already are kept, unless `again`.

    A subject that fails or exceeds its limit has a row that says so, and the next one is measured.
    """
    results = open_results(out, THREADS[size])
    for subject in pick(subjects, size):
        known = find_row(results.rows, subject, size)
        if known and not again and known.stopped is None and _is_this_commit(known):
            say(f"{subject}: measured at this commit; --again measures anew")
            continue
        say(f"{subject}, {size}: at most {SUBJECTS[subject].cases[size].limit_s * PROCESSES[size]} s …")
        row = run_case(subject, size)
        say(describe_row(row))
        results = place_row(results, row)
        write_results(out, results)
    return results


def open_results(out: Path, threads: int) -> Results:
    """Return the rows that a file has, none if there is no file; it must be this machine's."""
    machine = describe_machine(threads)
    if not out.exists():
        return Results(machine=machine)
    results = read_results(out)
    refuse_unlike(results.machine, machine, str(out))
    return results


def pick(subjects: Sequence[str], size: Size) -> list[str]:
    """Return the subjects that have this size, all of them if none is named; InputError for an unknown one."""
    for one in subjects:
        if size not in (SUBJECTS[one].cases if one in SUBJECTS else {}):
            known = ", ".join(name for name, subject in SUBJECTS.items() if size in subject.cases)
            raise InputError(f"no subject {one!r} of size {size}", hint=f"there are {known}")
    return list(subjects) or [name for name, subject in SUBJECTS.items() if size in subject.cases]


def run_case(subject: str, size: Size) -> Row:
    """Measure one case in as many processes as its size has, one after the other; samples are put together."""
    found: list[Measured] = []
    for _ in range(PROCESSES[size]):
        measured, stopped = run_process(subject, size, SUBJECTS[subject].cases[size].limit_s)
        if measured is None:
            return make_row(subject, size, Measured(), stopped)
        found.append(measured)
    return make_row(subject, size, join(found))


def run_process(subject: str, size: Size, limit_s: float) -> tuple[Measured | None, str]:
    """Measure one case in one process; returns what was found, or None and why there is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "measured.json")
        command = [sys.executable, "-m", "speed.child", subject, size, str(out)]
        process = subprocess.Popen(
            command, env=make_environment(THREADS[size]), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, said = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.communicate()
            return None, f"stopped after {limit_s:g} s"
        if process.returncode != 0:
            lines = [line for line in said.splitlines() if line.strip()]
            return None, lines[-1] if lines else f"ended with status {process.returncode}"
        return decode(Measured, out.read_bytes(), where=subject), ""


def join(found: Sequence[Measured]) -> Measured:
    """Put the samples of several processes together, in their order."""
    first = found[0]
    samples: dict[str, list[float]] = {}
    for one in found:
        for figure in one.figures:
            samples.setdefault(figure.name, []).extend(figure.samples)
    figures = tuple(make_figure(one.name, one.unit, samples[one.name], one.effect) for one in first.figures)
    return Measured(figures=figures, parameters=first.parameters, left_out=first.left_out)


def describe_row(row: Row) -> str:
    """Return a row in words: its figures, and whether those with a bar meet it at full size."""
    if row.stopped is not None:
        return f"{row.subject}, {row.size}: {row.stopped}"
    lines = [f"{row.subject}, {row.size}:"]
    lines += [f"  {_describe_figure(one)}{judge_bar(row, one)}" for one in row.measured.figures]
    lines += [f"  {name} is left out: {why}" for name, why in row.measured.left_out.items()]
    return "\n".join(lines)


def judge_bar(row: Row, figure: Figure) -> str:
    """Return whether a figure meets its bar, in words; empty where it has none."""
    subject = SUBJECTS.get(row.subject)
    if subject is None or row.size != "full":
        return ""
    highest, least = subject.bars.get(figure.name), subject.at_least.get(figure.name)
    if highest is not None:
        return f"; bar ≤ {highest:.4g}: {'met' if figure.value <= highest else 'MISSED'}"
    if least is not None:
        return f"; bar ≥ {least:.4g}: {'met' if figure.value >= least else 'MISSED'}"
    return ""


def _is_this_commit(row: Row) -> bool:
    here = find_commit()
    return row.commit == here and not here.endswith("+")  # changed code has no commit to go by


def _describe_figure(figure: Figure) -> str:
    spread = f" ({min(figure.samples):.4g} to {max(figure.samples):.4g})" if len(figure.samples) > 1 else ""
    return f"{figure.name} {figure.value:.4g} {figure.unit}{spread}"


def make_environment(threads: int) -> dict[str, str]:
    """Return the environment of a measuring process: its threads, and what makes runs alike."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(pools, str(threads)),
        "OMP_WAIT_POLICY": "passive",  # threads that wait spend no CPU seconds
        "PYTHONHASHSEED": "0",
        "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
    }
