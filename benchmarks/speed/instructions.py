"""Counts the instructions of the smallest cases under valgrind, which no load of the machine changes.

The counts hold for one processor and one build of torch; against others they are not compared.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rankship_pipeline.foundation.errors import MeasurementError, UnlikeConditions
from speed.counted import CONTROL, JOBS
from speed.judge import Verdict, judge
from speed.records import (
    Measured,
    Results,
    describe_machine,
    make_figure,
    make_row,
    place_row,
    read_results,
    write_results,
)
from speed.run import make_environment

VALGRIND = "valgrind"
TIMES = 1  # each job is counted so often in one process: counts of one commit differ by a thousandth
EFFECT = 0.03  # of a count
LIMIT_S = 900


def find_lack() -> str:
    """Return which program is missing here, empty if none is."""
    missing = [name for name in (VALGRIND, CONTROL) if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} here: apt-get install valgrind" if missing else ""


def count_all(out: Path, say: Callable[[str], None], times: int = TIMES) -> Results:
    """Count every job, in one process, and write the counts; MeasurementError if valgrind fails or is too slow."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder, "callgrind.out")
        command = [
            VALGRIND,
            "--tool=callgrind",
            "--instr-atstart=no",
            "--collect-atstart=no",
            f"--callgrind-out-file={dumps}",
            *(sys.executable, "-m", "speed.counted", str(times)),
        ]
        try:
            done = subprocess.run(
                command, env=make_environment(1), capture_output=True, text=True, check=False, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            raise MeasurementError(
                f"counting instructions was stopped after {LIMIT_S} s", hint="count on a machine with less load"
            ) from None
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("==")]
            last = (said or ["nothing was said"])[-1]
            raise MeasurementError(f"counting instructions failed: {last}", hint="run python -m speed.counted 1")
        counts = read_dumps(Path(folder))
    results = Results(machine=describe_machine(1))
    for name in JOBS:
        figure = make_figure("instructions", "instructions", counts[name], EFFECT)
        say(f"{name}: {figure.value:,.0f} instructions")
        row = make_row(name, "small", Measured(figures=(figure,), parameters={"times": str(times)}))
        results = place_row(results, row)
    write_results(out, results)
    return results


def read_dumps(folder: Path) -> dict[str, list[int]]:
    """Return the counts by the name that each dump was given, in the order of the dumps."""
    counts: dict[str, list[int]] = {}
    for path in sorted(folder.glob("callgrind.out.*"), key=lambda path: int(path.suffix[1:])):
        text = path.read_text(encoding="utf-8", errors="replace")
        name, total = (
            re.search(r"^desc: Trigger: dump (\S+)", text, re.MULTILINE),
            re.search(r"^totals: (\d+)", text, re.MULTILINE),
        )
        if name and total:
            counts.setdefault(name[1], []).append(int(total[1]))
    return counts


def compare_counts(baseline: Path, counted: Results, say: Callable[[str], None]) -> tuple[Verdict, ...]:
    """Judge the counts against earlier ones; nothing is compared where their file is missing or of another machine."""
    if not baseline.exists():
        say(f"not compared: there are no counts at {baseline}")
        return ()
    try:
        return judge(read_results(baseline), counted, str(baseline), but=("cores", "memory_gib"))
    except UnlikeConditions as unlike:
        say(f"not compared: {unlike}")
        return ()
