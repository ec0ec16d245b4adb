"""The verb `compare`: judges a run against an earlier one, case by case; exit status 1 only if a case is worse."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.flags import parse, start_parser

if TYPE_CHECKING:
    from rich.console import Console

    from rankship_benchmarks.judge.compare import Outcome, Verdict
    from rankship_benchmarks.stats.estimates import Estimate

_STYLES: "dict[Outcome, str]" = {"better": "green", "worse": "bold red", "same": "", "unknown": "yellow"}


def compare(argv: list[str]) -> int:
    """`rankship compare RUN_A RUN_B`: print whether B is better or worse than A, case by case, and why."""
    parser = start_parser(
        "compare", "Judge a run against an earlier one. Exit status 1: a case is worse; 5: the conditions differ."
    )
    parser.add_argument("baseline", type=Path, help="the earlier run's folder")
    parser.add_argument("candidate", type=Path, help="the later run's folder")
    parser.add_argument("--effect", type=float, default=0.03, help="the smallest change to find (default: %(default)s)")
    parser.add_argument(
        "--across", action="append", default=[], metavar="ASPECT", help="a condition that may differ; repeat for more"
    )
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_benchmarks.bundle.bundle import open_bundle
    from rankship_benchmarks.judge.changes import explain_case, list_words
    from rankship_benchmarks.judge.comparability import refuse_unlike_runs
    from rankship_benchmarks.judge.compare import Rule, compare_bundles
    from rankship_benchmarks.judge.compare_energy import compare_energies
    from rankship_benchmarks.measure.device_accuracy import read_device_scores
    from rankship_benchmarks.report.accuracy_words import state_changes
    from rankship_pipeline.foundation.errors import InputError

    if not 0 < arguments.effect < 1:
        raise InputError(f"--effect is {arguments.effect}, expected a share between 0 and 1", hint="3 % is 0.03")
    baseline, candidate = open_bundle(arguments.baseline), open_bundle(arguments.candidate)
    rule = Rule(effect=arguments.effect)
    verdicts = compare_bundles(baseline, candidate, rule, across=arguments.across)
    energies = compare_energies(baseline, candidate, rule)
    cautions = [str(one) for one in refuse_unlike_runs(baseline, candidate, across=arguments.across)]
    cautions += [
        f"{one.header.run_id} is unfinished: {len(one.trials)} trials so far"
        for one in (baseline, candidate)
        if not one.finished
    ]
    console = Console(highlight=False)
    print_verdicts(verdicts, cautions, console)
    if energies:
        print_verdicts(energies, (), console)
    for line in state_changes(*map(read_device_scores, (arguments.baseline, arguments.candidate))):
        console.print(line, markup=False)
    outcomes = {one.key: one.verdict for one in verdicts}
    for one in (*verdicts, *energies):
        if one.verdict == "worse":
            why = explain_case(baseline, candidate, one.key, outcomes)
            console.print(f"{one.key.heading}, {one.figure}: worse", style="bold red", markup=False)
            for line in list_words(why):
                console.print(f"    {line}", markup=False, soft_wrap=True)
    return 1 if any(one.verdict == "worse" for one in (*verdicts, *energies)) else 0


def print_verdicts(verdicts: "tuple[Verdict, ...]", cautions: Iterable[str], console: "Console") -> None:
    """Print the table of verdicts, how the canary changed, and every caution."""
    from rich.markup import escape

    from rankship_benchmarks.report.words import UNKNOWN
    from rankship_pipeline.foundation.console import start_table

    figure = verdicts[0].figure if verdicts else "time"
    table = start_table("case", "verdict", f"{figure} vs baseline\n[95 %]", "why")
    for one in verdicts:
        ratio = _show_finely(one.ratio) if one.ratio else UNKNOWN
        case = f"{one.key.model}\n{one.key.format}"
        table.add_row(case, one.verdict, ratio, escape(one.reason), style=_STYLES[one.verdict])
    table.columns[-1].justify = "left"
    console.print(table)
    canary = verdicts[0].canary_ratio if verdicts else None
    if canary is None:
        note = "No canary counts in both runs: a change of the whole device would look like a change of every case."
    else:
        moved = f"its own {figure} is {_show_finely(canary)} of the baseline's"
        note = f"{figure.capitalize()} is relative to the canary's; {moved}."
    console.print(note, markup=False)
    for caution in cautions:
        console.print(f"! {caution}", style="yellow", markup=False)


def _show_finely(ratio: "Estimate") -> str:
    """Show a ratio with three decimals, because the effects to find are a few per cent."""
    from rankship_benchmarks.judge.summary import TIMES

    interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"{TIMES} {ratio.value:.3f}{interval}"
