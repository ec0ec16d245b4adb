"""The verb `lab`: draws the page of all devices, cases, nights and runs."""

from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.flags import parse, start_parser


def lab(argv: list[str]) -> int:
    """`rankship lab`: bring the index up to date and draw the lab's page, which opens offline."""
    parser = start_parser(
        "lab", "Draw a page of all devices, cases, nights and runs of a results folder.", "--inventory", "--results"
    )
    parser.set_defaults(results=Path("rankship-nightly"))
    arguments = parse(parser, argv)
    if not arguments.results.is_dir():
        raise InputError(f"{arguments.results}: no such folder", hint="name the results folder with --results")

    from rich.console import Console

    from rankship_benchmarks.index.index import refresh_own_index
    from rankship_benchmarks.nightly.lab import write_lab
    from rankship_benchmarks.nightly.records import list_nights
    from rankship_targets.devices.device import load_inventory

    devices = load_inventory(arguments.inventory)
    engine = refresh_own_index(arguments.results)
    page = write_lab(arguments.results, engine, list_nights(arguments.results), devices)
    Console(highlight=False).print(f"page: {page}", soft_wrap=True, markup=False)
    return 0
