"""The verb `compress`: from trained models to verified artifacts in a folder, through the build that recipes use."""

import argparse
from pathlib import Path

from rankship_benchmarks.verbs.stream import add_stream_flags, refuse_stream_flags, stream_model
from rankship_pipeline.flow.start import suit_ranks
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable, write_atomic
from rankship_pipeline.foundation.flags import parse, start_parser
from rankship_pipeline.recipe.draft import (
    Tables,
    add_budget_flags,
    add_data_flags,
    choose_formats,
    name_models,
    place,
    take_budget,
    take_data,
    take_precision,
    write_recipe,
)

RECIPE = "recipe.toml"
_HEADING = (
    "Written by `rankship compress`, which does what this recipe says. To go on:",
    f"  rankship run {RECIPE} --on this-machine    # measure; the build is taken from the store",
)


def compress(argv: list[str]) -> int:
    """`rankship compress MODEL --kept 0.5 --images FOLDER --to FOLDER`: build, verify, and write the files there."""
    parser = start_parser(
        "compress",
        "Compress a Hugging Face model to a budget, export it, prove that every file computes what torch computes, and"
        " write files and records to a folder. Several models are merged first.",
        "--inventory",
        "--formats",
        "--profile",
        "--store",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model's folder, or its id on the hub")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="where to write them; created if missing"
    )
    parser.add_argument("--merge", metavar="METHOD", help='how several models become one (default: "joint")')
    add_data_flags(parser)
    add_budget_flags(parser)
    add_stream_flags(parser)
    arguments = parse(parser, argv)

    from rankship_pipeline.foundation.profile_file import profile_to

    with profile_to(arguments.profile, "compress"):
        if arguments.stream:
            stream_model(arguments)
        else:
            refuse_stream_flags(arguments)
            _compress(arguments)
    return 0


def _compress(arguments: argparse.Namespace) -> None:
    from rankship_benchmarks.measure.copies import write_copies
    from rankship_benchmarks.measure.host_gate import verify_on_host
    from rankship_benchmarks.report.words import print_parity
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store
    from rankship_pipeline.verbs import prepare_recipe

    ensure_writable(arguments.to, "--to")
    ensure_writable(arguments.store, "--store")
    recipe = _keep_recipe(arguments.to / RECIPE, draft_recipe(arguments))
    steps, store = Steps(), Store(arguments.store)
    prepared = prepare_recipe(recipe, steps, store)
    store.sweep()

    from rich.console import Console

    from rankship_pipeline.flow.build import build_recipe  # after the recipe was read: this imports torch
    from rankship_pipeline.flow.show import print_build

    if prepared.recipe.budget.on is not None:
        from rankship_benchmarks.costs.landing import land_missing
        from rankship_targets.devices.device import find_device

        device = find_device(prepared.recipe.budget.on, arguments.inventory)
        land_missing(prepared, store, device, arguments.to / "timings", steps)
    build, entry = build_recipe(prepared, store, steps)
    verified = verify_on_host(build, store, prepared.recipe.parity, steps)
    written = write_copies(build, verified, store, arguments.to)
    print_build(build, entry)
    console = Console(highlight=False)
    print_parity(verified, console)
    for path in (recipe, *written):
        console.print(f"{path}", soft_wrap=True, markup=False)


def draft_recipe(arguments: argparse.Namespace) -> str:
    """Return the recipe that the command line describes, with paths relative to the folder that it is written to."""
    folder: Path = arguments.to
    names = name_models(arguments.models)
    data = take_data(arguments, folder)
    if not data:
        raise InputError(
            "compressing needs data: unlabelled samples for calibration, labelled ones to measure the accuracy lost",
            hint="name them: --images FOLDER, --text FILE or --csv FILE",
        )
    if arguments.merge is not None and len(names) == 1:
        raise InputError(
            "--merge is for several models, got one", hint="name more than one model, or leave --merge out"
        )
    pairs, ranks = zip(names, arguments.models, strict=True), suit_ranks(arguments.models, arguments.precision)
    tables: Tables = {
        "models": [{"name": name, "huggingface": place(one, folder)} for name, one in pairs],
        "data": data,
        **({"merge": {"method": arguments.merge or "joint"}} if len(names) > 1 else {}),
        "budget": take_budget(arguments, folder),
        **({"ranks": ranks} if ranks else {}),
        **take_precision(arguments),
        "export": {"formats": list(choose_formats(arguments.formats))},
    }
    return write_recipe(_HEADING, names[0], tables)


def _keep_recipe(path: Path, text: str) -> Path:
    """Write the recipe, which the same command may do again; InputError if a different recipe is there already."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{path} was written by another command", hint="name another folder with --to, or move it away"
        )
    write_atomic(path, text.encode())
    return path
