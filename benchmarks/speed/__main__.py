"""Measures speed, and compares it with an earlier commit's: `python -m speed --help`.

`run` measures subjects one after the other and keeps their rows, `compare` judges two files of rows (exit status 1 if
anything is worse), `count` counts the instructions of the smallest cases and compares them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rankship_pipeline.foundation.console import start_table
from rankship_pipeline.foundation.errors import InputError, RankshipError
from rankship_pipeline.foundation.files import write_atomic
from speed.judge import Verdict, judge, list_lost
from speed.records import ROOT, SIZES, find_row, read_results
from speed.run import describe_row, run_cases
from speed.subjects import SUBJECTS

BUILD = ROOT / "build/speed"
INSTRUCTIONS = ROOT / "benchmarks/baselines/speed/instructions.json"


def say(text: str) -> None:
    """Write a line to standard output at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(arguments: argparse.Namespace) -> int:
    """Measure subjects and keep their rows."""
    out = arguments.out or BUILD / f"{arguments.size}.json"
    results = run_cases(arguments.subjects, arguments.size, out, say, again=arguments.again)
    say(f"{len(results.rows)} rows in {out}")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print a file's rows, at full size with what was wanted."""
    for row in read_results(arguments.file).rows:
        say(f"{describe_row(row)}\n  at {row.commit or 'an unknown commit'}, load {row.load_average:g}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Print how every figure changed; 1 if any became worse or a subject no longer runs."""
    before, after = read_results(arguments.before), read_results(arguments.after)
    status = print_verdicts(judge(before, after, str(arguments.before)))
    lost = list_lost(before, after)
    for one in lost:
        say(f"no longer measured: {one}")
    return int(status or bool(lost))


def count(arguments: argparse.Namespace) -> int:
    """Count instructions of the smallest cases, and compare; left out by name where there is no valgrind."""
    from speed.instructions import compare_counts, count_all, find_lack

    lack = find_lack()
    if lack:
        say(f"instructions are not counted: {lack}")
        return 0
    counted = count_all(arguments.out or BUILD / "instructions.json", say)
    return print_verdicts(compare_counts(arguments.baseline, counted, say))


def draw(arguments: argparse.Namespace) -> int:
    """Draw the growth of the cost with the model."""
    from speed.growth import draw_growth

    row = find_row(read_results(arguments.file).rows, "growth", arguments.size)
    if row is None or row.stopped is not None:
        raise InputError(f"{arguments.file} has no growth of size {arguments.size}", hint="run growth first")
    write_atomic(arguments.out, draw_growth(row.measured).encode())
    return 0


def list_subjects(_arguments: argparse.Namespace) -> int:
    """Print every subject with its sizes, its time limits and its bars."""
    for name, subject in SUBJECTS.items():
        limits = ", ".join(f"{size} ≤ {case.limit_s} s" for size, case in subject.cases.items())
        bars = [f"{figure} ≤ {bar:.4g}" for figure, bar in subject.bars.items()]
        bars += [f"{figure} ≥ {bar:.4g}" for figure, bar in subject.at_least.items()]
        say(f"{name:22} {limits:32} {'; '.join(bars)}")
    return 0


def print_verdicts(verdicts: Sequence[Verdict]) -> int:
    """Print verdicts as a table and return 1 if any is worse."""
    from rich.console import Console

    table = start_table("subject", "figure", "later / earlier", "verdict", "why")
    for one in verdicts:
        table.add_row(one.subject, one.figure, f"{one.ratio:.3f}", one.verdict, one.reason)
    if verdicts:
        Console().print(table)
    else:
        say("nothing to compare")
    return int(any(one.verdict == "worse" for one in verdicts))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def add(name: str, job: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=(job.__doc__ or "").split("\n")[0])
        command.set_defaults(job=job)
        return command

    add("list", list_subjects)
    runs = add("run", run)
    runs.add_argument("subjects", nargs="*", help="all that have the size, if none is named")
    runs.add_argument("--size", choices=SIZES, default="small")
    runs.add_argument("--out", type=Path, help="a file to which rows are added (default: build/speed/SIZE.json)")
    runs.add_argument("--again", action="store_true", help="measure what this commit has already")
    add("show", show).add_argument("file", type=Path)
    compares = add("compare", compare)
    compares.add_argument("before", type=Path)
    compares.add_argument("after", type=Path)
    counts = add("count", count)
    counts.add_argument("--out", type=Path)
    counts.add_argument("--baseline", type=Path, default=INSTRUCTIONS)
    draws = add("draw", draw)
    draws.add_argument("file", type=Path)
    draws.add_argument("--size", choices=SIZES, default="full")
    draws.add_argument("--out", type=Path, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of ours ends it with its message and status."""
    arguments = make_parser().parse_args(argv)
    try:
        status: int = arguments.job(arguments)
    except RankshipError as failure:
        sys.stderr.write(f"{failure}\n")
        return failure.exit_code
    return status


if __name__ == "__main__":
    sys.exit(main())
