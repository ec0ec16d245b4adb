"""The verbs of the pipeline package: `init`, `build`, `show` and `merge`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.flags import parse, start_parser
from rankship_pipeline.recipe.draft import add_budget_flags, add_data_flags

if TYPE_CHECKING:
    from rankship_pipeline.flow.prepared import Prepared
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.records import Build
    from rankship_pipeline.foundation.store import Entry, Store
    from rankship_pipeline.recipe.choices import Recipe


def build(argv: list[str]) -> int:
    """`rankship build RECIPE`: builds the recipe's artifacts and prints the build with its hash."""
    parser = start_parser("build", "Build a recipe's artifacts; the same command resumes.", "--profile", "--store")
    parser.add_argument("recipe", type=Path, help="the recipe's TOML file")
    arguments = parse(parser, argv)

    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.files import ensure_writable
    from rankship_pipeline.foundation.profile_file import profile_to
    from rankship_pipeline.foundation.store import Store

    steps, store = Steps(), Store(arguments.store)
    with profile_to(arguments.profile, "build"):
        prepared = prepare_recipe(arguments.recipe, steps, store)
        ensure_writable(arguments.store, "--store")
        store.sweep()

        from rankship_pipeline.flow.build import build_recipe  # after the recipe was read: this imports torch
        from rankship_pipeline.flow.show import print_build

        made, entry = build_recipe(prepared, store, steps)
        print_build(made, entry)
    return 0


def show(argv: list[str]) -> int:
    """`rankship show BUILD`: prints a finished build, by its recipe or its hash."""
    parser = start_parser("show", "Print the ranks, sizes and accuracy of a finished build.", "--store")
    parser.add_argument("build", help="a recipe.toml, or the first letters of a build's hash")
    arguments = parse(parser, argv)

    from rankship_pipeline.flow.show import print_build
    from rankship_pipeline.foundation.store import Store

    print_build(*find_by_name(arguments.build, Store(arguments.store)))
    return 0


def prepare_recipe(path: Path, steps: "Steps", built: "Store | None" = None) -> "Prepared":
    """Read a recipe and run all checks that come before long work, but those that its build in `built` has passed."""
    from rankship_pipeline.recipe.rules import read_recipe

    recipe = read_recipe(path)  # before torch is imported, so that typing mistakes are reported at once
    with steps.step("check the recipe, its models and its data"):
        from rankship_pipeline.flow.build import is_built
        from rankship_pipeline.flow.preflight import finish_checks, identify

        prepared = identify(recipe, path.resolve().parent)
        if built is None or not is_built(prepared, built):
            prepared = finish_checks(prepared)
    for note in prepared.notes:
        steps.note(note)
    return prepared


def find_by_name(name: str, store: "Store") -> "tuple[Build, Entry]":
    """A finished build by the path of its recipe or by a prefix of its hash."""
    from rankship_pipeline.flow.build import read_build
    from rankship_pipeline.foundation.console import Steps

    if name.endswith(".toml"):
        return find_built_recipe(Path(name), store, Steps())[1:]
    entry = store.match("build", name)
    return read_build(entry), entry


def find_built_recipe(path: Path, store: "Store", steps: "Steps") -> "tuple[Recipe, Build, Entry]":
    """A recipe with all that follows from its models, and its finished build; InputError if there is none."""
    from rankship_pipeline.recipe.rules import read_recipe

    recipe = read_recipe(path)  # before torch is imported, so that typing mistakes are reported at once
    with steps.step("find the recipe's build"):
        from rankship_pipeline.flow.build import find_build
        from rankship_pipeline.flow.preflight import identify

        prepared = identify(recipe, path.resolve().parent)
        return prepared.recipe, *find_build(prepared, store)


def merge(argv: list[str]) -> int:
    """`rankship merge FILE --to FOLDER`: merges checkpoints and prints the new folder; the same command resumes."""
    parser = start_parser(
        "merge",
        "Merge safetensors checkpoints into one folder, one tensor in memory at a time; the same command resumes at"
        " the first missing shard.",
    )
    parser.add_argument("file", type=Path, help="a TOML file: models, base, [merge], dtype, seed")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="the new folder; it must not exist")
    arguments = parse(parser, argv)

    from rankship_pipeline.recipe.merge_file import read_merge_file

    asked = read_merge_file(arguments.file)  # before torch is imported, so that typing mistakes are reported at once

    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.files import ensure_writable

    ensure_writable(arguments.to.absolute().parent, "--to")

    from rankship_pipeline.stream.merge import merge_checkpoints

    merge_checkpoints(asked, arguments.file.resolve().parent, arguments.to.absolute(), Steps())
    sys.stdout.write(f"{arguments.to}\n")
    return 0


def init(argv: list[str]) -> int:
    """`rankship init NAME`: writes a commented recipe, and the files that it needs, which build unchanged."""
    parser = start_parser(
        "init",
        "Write a commented recipe NAME.toml, and stand-in files for a model or data that you do not name. The stand-in"
        " for a model is a small network trained on scikit-learn's digits.",
        "--formats",
    )
    parser.add_argument("name", type=Path, help="the recipe's name, or its path")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--huggingface", metavar="ID", help="a Hugging Face model: its folder, or its id on the hub")
    which.add_argument("--factory", metavar="FILE:FUNCTION", help="a function of yours that returns the torch module")
    of_factory = parser.add_mutually_exclusive_group()
    of_factory.add_argument("--weights", type=Path, metavar="FILE", help="weights of the factory's model (safetensors)")
    of_factory.add_argument("--train", metavar="FILE:FUNCTION", help="a function that trains the factory's model")
    add_data_flags(parser)
    add_budget_flags(parser)
    arguments = parse(parser, argv)

    from rankship_pipeline.flow.start import start_recipe

    for line in start_recipe(arguments):
        sys.stdout.write(f"{line}\n")
    return 0
