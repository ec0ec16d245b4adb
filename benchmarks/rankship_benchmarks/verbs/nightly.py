"""The verbs over many runs: `index`, `export` and `nightly`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.errors import InputError, RankshipError
from rankship_pipeline.foundation.flags import parse, start_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apprise import Apprise

    from rankship_benchmarks.bundle.suite import Suite
    from rankship_benchmarks.fleet.measure import Lab, Measure
    from rankship_benchmarks.nightly.records import NightRecord
    from rankship_pipeline.foundation.console import Steps


def index(argv: list[str]) -> int:
    """`rankship index`: update the index of a results folder; exit status 5 if a bundle cannot be read."""
    parser = start_parser("index", "Update the index over many runs.", "--results")
    parser.add_argument("--url", default=None, help="database (default: index.sqlite in the results folder)")
    arguments = parse(parser, argv)
    _check_results(arguments.results)

    from rich.console import Console

    from rankship_benchmarks.index.index import default_url, open_index, refresh_index
    from rankship_pipeline.foundation.errors import MeasurementError

    done = refresh_index(open_index(arguments.url or default_url(arguments.results)), arguments.results)
    console = Console(highlight=False)
    counts = f"{len(done.added)} read, {done.unchanged} unchanged, {len(done.removed)} removed"
    console.print(f"index: {counts}", soft_wrap=True, markup=False)
    for folder, reason in done.damaged.items():
        console.print(f"! {folder} cannot be read: {reason}", style="yellow", soft_wrap=True, markup=False)
    return MeasurementError.exit_code if done.damaged else 0


def export(argv: list[str]) -> int:
    """`rankship export RESULTS`: write rows for a notebook, or log runs to an MLflow server."""
    parser = start_parser("export", "Write many runs to a table for notebooks, or log them to MLflow.")
    parser.add_argument("results", type=Path, help="a results folder, or one run's folder")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="FILE", help="a file ending in .parquet or .csv")
    where.add_argument("--mlflow", metavar="URI", help="tracking server or store, for example sqlite:///mlflow.db")
    rows = "one row per trial with its median, per inference, or per trial that a meter watched (default: %(default)s)"
    parser.add_argument("--rows", choices=("trials", "samples", "energy"), default="trials", help=rows)
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_benchmarks.index.frames import list_bundles, write_frame

    console, folders = Console(highlight=False), list_bundles(arguments.results)
    if arguments.to is not None:
        count = write_frame(folders, arguments.rows, arguments.to)
        console.print(f"{count:,} rows of {len(folders)} runs: {arguments.to}", soft_wrap=True, markup=False)
        return 0
    from rankship_benchmarks.index.mlflow_export import log_bundles

    logged, refused = log_bundles(folders, arguments.mlflow)
    console.print(
        f"{logged} of {len(folders)} runs logged; the others were there already or must not be used", markup=False
    )
    for reason in refused:
        console.print(f"! {reason}", style="yellow", soft_wrap=True, markup=False)
    return 0


def nightly(argv: list[str]) -> int:
    """`rankship nightly SUITE --on DEVICE[/TWIN][,DEVICE]`: build, measure, compare with the nights before, report."""
    parser = start_parser(
        "nightly",
        "Build, measure every device, compare with the nights before, draw a page. An interrupted night resumes.",
        "--inventory",
        "--scheduler",
        "--keys",
        "--results",
        "--store",
        epilog="Exit status: 1 a case is worse, 4 a device was not measured, 5 what was measured must not be used."
        " A message about a night that does not end with 0 goes to the addresses in $RANKSHIP_ALERT_URLS or in the file"
        " that $RANKSHIP_ALERT_URLS_FILE names (extra: alerts).",
    )
    parser.add_argument("suite", type=Path)
    on = "devices, separated by commas; after a slash, a twin to use while the device cannot be reached"
    parser.add_argument("--on", required=True, metavar="DEVICE[/TWIN]", help=on)
    git = (
        "a folder of your repository: the night notes its commit, and names those since the night before if it is worse"
    )
    parser.add_argument("--git", type=Path, default=None, metavar="FOLDER", help=git)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write what the night found there")
    parser.set_defaults(results=Path("rankship-nightly"))
    arguments = parse(parser, argv)

    from rankship_benchmarks.bundle.suite import read_suite
    from rankship_benchmarks.fleet.schedule import read_jobs
    from rankship_benchmarks.nightly.alerts import read_addresses
    from rankship_benchmarks.nightly.night import Tonight, run_night
    from rankship_benchmarks.nightly.page import PAGE
    from rankship_benchmarks.nightly.records import list_nights
    from rankship_benchmarks.verbs.where import open_lab, refuse_exam
    from rankship_pipeline.foundation.codec import digest
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.files import ensure_writable
    from rankship_pipeline.recipe.rules import read_recipe

    if arguments.json is not None:
        arguments.json.unlink(missing_ok=True)  # whatever happens, it does not tell of another night
    addresses = read_addresses()
    suite, recipe = read_suite(arguments.suite)  # `recipe` is the path of the suite's recipe
    jobs = read_jobs(arguments.on)
    refuse_exam(suite, arguments.scheduler)
    ensure_writable(arguments.store, "--store")
    ensure_writable(arguments.results, "--results")
    steps = Steps()
    tonight = Tonight(
        results=arguments.results,
        suite=(arguments.suite.stem, digest(suite)),
        recipe=read_recipe(recipe).name,
        jobs=jobs,
        repository=arguments.git,
    )
    try:
        with open_lab(jobs, arguments) as lab:
            night = run_night(tonight, lambda: _prepare_night(arguments, recipe, suite, lab, steps), steps)
    except RankshipError as failure:
        failed = [one for one in list_nights(arguments.results)[-1:] if one.failure == str(failure)]
        _tell(failed, addresses, arguments.json, steps)
        raise
    if night is None:
        steps.note(f"another nightly is running in {arguments.results}: nothing to do")
        return 0
    _print_night(night, arguments.results / PAGE)
    _tell([night], addresses, arguments.json, steps)
    return night.exit_code or 0


def _prepare_night(
    arguments: argparse.Namespace, recipe: Path, suite: "Suite", lab: "Lab", steps: "Steps"
) -> "tuple[str, Measure]":
    """Build and verify once; returns the build's digest and the function that measures one device."""
    from rankship_benchmarks.fleet.measure import plan_measuring
    from rankship_benchmarks.measure.cases import list_wanted
    from rankship_pipeline.foundation.codec import digest
    from rankship_pipeline.foundation.store import Store
    from rankship_pipeline.verbs import prepare_recipe

    store = Store(arguments.store)
    prepared = prepare_recipe(recipe, steps, store)

    from rankship_pipeline.flow.build import build_recipe  # after the recipe was read: this imports torch

    store.sweep()
    build, _ = build_recipe(prepared, store, steps)
    plan = plan_measuring(build, prepared, suite, store, arguments.results, steps, profile=True)

    wanted = list_wanted(suite, prepared.recipe.export.formats)

    def check_and_measure(device: str, own: "Steps") -> Path:
        lab.check(device, wanted, own, with_energy=suite.energy is not None)
        return lab.measure(plan, device, own)

    return digest(build), check_and_measure


def _tell(nights: "Sequence[NightRecord]", addresses: "Apprise | None", json_file: Path | None, steps: "Steps") -> None:
    """Write the last of `nights` to a file, and send a message unless its exit status is 0."""
    from rankship_benchmarks.nightly.alerts import send_message, summarise_night, write_message
    from rankship_pipeline.foundation.codec import encode
    from rankship_pipeline.foundation.files import write_atomic

    for night in nights:
        if json_file is not None:
            write_atomic(json_file, encode(summarise_night(night)).encode() + b"\n")
        if addresses is not None and night.exit_code:
            sent = send_message(addresses, *write_message(night))
            steps.note("a message was sent" if sent else "! an address did not take the message")


def _print_night(night: "NightRecord", page: Path) -> None:
    from rich.console import Console

    from rankship_benchmarks.nightly.page import SIGNS, list_alarms, list_gaps, state_headline
    from rankship_benchmarks.report.words import show_ratio
    from rankship_pipeline.foundation.console import start_table

    console = Console(highlight=False)
    console.print(f"night {night.number}: {state_headline(night)}", style="bold", markup=False, soft_wrap=True)
    table = start_table("device", "case", "verdict", "ratio")
    for one in night.devices:
        marked = [*((case, "") for case in one.cases), *((case, ", energy") for case in one.energies)]
        for case, figure in marked:
            ratio = show_ratio(case.ratio) if case.ratio else "–"
            verdict = f"{SIGNS[case.verdict]} {case.verdict}"
            table.add_row(one.device, f"{case.key.heading}{figure}", verdict, ratio)
    console.print(table)
    for alarm in list_alarms(night):
        console.print(f"▲ {alarm.text}", style="red", markup=False, soft_wrap=True)
        for line in alarm.reasons:
            console.print(f"    {line}", markup=False, soft_wrap=True)
    for line in list_gaps(night):
        console.print(f"! {line}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"page: {page}", markup=False, soft_wrap=True)


def _check_results(results: Path) -> None:
    if not results.is_dir():
        raise InputError(f"{results}: no such folder", hint="name the results folder with --results")
