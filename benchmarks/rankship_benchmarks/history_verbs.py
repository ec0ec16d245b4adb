"""The verbs over many runs: `index`, `export` and `nightly`."""

import argparse
from pathlib import Path

from rankship_pipeline.errors import InputError


def index(argv: list[str]) -> int:
    """`rankship index`: bring the index over a results folder up to date; exit 5 if a bundle cannot be read."""
    parser = argparse.ArgumentParser(prog="rankship index", description="Bring the index over many runs up to date.")
    _add_results_flag(parser)
    parser.add_argument("--url", default=None, help="database (default: index.sqlite in the results folder)")
    arguments = parser.parse_args(argv)
    _check_results(arguments.results)

    from rich.console import Console

    from rankship_benchmarks.index import default_url, open_index, refresh_index
    from rankship_pipeline.errors import MeasurementError

    done = refresh_index(open_index(arguments.url or default_url(arguments.results)), arguments.results)
    console = Console(highlight=False)
    counts = f"{len(done.added)} read, {done.unchanged} unchanged, {len(done.removed)} removed"
    console.print(f"index: {counts}", soft_wrap=True, markup=False)
    for folder, reason in done.damaged.items():
        console.print(f"! {folder} cannot be read: {reason}", style="yellow", soft_wrap=True, markup=False)
    return MeasurementError.exit_code if done.damaged else 0


def export(argv: list[str]) -> int:
    """`rankship export RESULTS`: rows for a notebook, or runs for an MLflow server."""
    parser = argparse.ArgumentParser(prog="rankship export", description="Give many runs to a notebook or to MLflow.")
    parser.add_argument("results", type=Path, help="a results folder, or one run's folder")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="FILE", help="a file ending in .parquet or .csv")
    where.add_argument("--mlflow", metavar="URI", help="tracking server or store, for example sqlite:///mlflow.db")
    rows = "one row per trial with its median, or one per inference (default: %(default)s)"
    parser.add_argument("--rows", choices=("trials", "samples"), default="trials", help=rows)
    arguments = parser.parse_args(argv)

    from rich.console import Console

    from rankship_benchmarks.frames import list_bundles, write_frame

    console, folders = Console(highlight=False), list_bundles(arguments.results)
    if arguments.to is not None:
        count = write_frame(folders, arguments.rows, arguments.to)
        console.print(f"{count:,} rows of {len(folders)} runs: {arguments.to}", soft_wrap=True, markup=False)
        return 0
    from rankship_benchmarks.mlflow_export import log_bundles

    logged, refused = log_bundles(folders, arguments.mlflow)
    console.print(f"{logged} of {len(folders)} runs logged, the others were there or must not be used", markup=False)
    for reason in refused:
        console.print(f"! {reason}", style="yellow", soft_wrap=True, markup=False)
    return 0


def _add_results_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("rankship-results"), help="default: %(default)s")


def _check_results(results: Path) -> None:
    if not results.is_dir():
        raise InputError(f"{results}: no such folder", hint="name the results folder with --results")
