"""The verb `eval`: what a language model and its files do on text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable, write_atomic
from rankship_pipeline.foundation.flags import parse, start_parser

if TYPE_CHECKING:
    from rich.table import Table

    from rankship_benchmarks.texts.evaluation import Evaluated

_WINDOWS = 16


def evaluate(argv: list[str]) -> int:
    """`rankship eval RECIPE [--tasks A,B --task-folder FOLDER]`: perplexity and tasks, in torch and in the runtimes."""
    parser = start_parser(
        "eval",
        "Judge a built language model on text: perplexity, and tasks of lm-evaluation-harness, of the models in torch"
        " and of every file in its own runtime on this machine.",
        "--formats",
        "--store",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--tasks", metavar="A,B", help="names of task files, such as arc_easy")
    parser.add_argument("--task-folder", type=Path, metavar="FOLDER", help="the task files (.yaml) and their data")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    parser.add_argument(
        "--windows", type=int, default=_WINDOWS, metavar="N", help="windows of the test text (default: %(default)s)"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the figures there too (JSON)")
    arguments = parse(parser, argv)
    if (arguments.tasks is None) != (arguments.task_folder is None):
        raise InputError("--tasks and --task-folder go together", hint="name both: task files are read from the folder")
    for name, number in (("--windows", arguments.windows), ("--limit", arguments.limit)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}", hint="give 1 or more")
    if arguments.to is not None:
        ensure_writable(arguments.to.absolute().parent, "--to")

    from rich.console import Console

    from rankship_benchmarks.texts.evaluation import TextChoice, evaluate_build
    from rankship_pipeline.flow.build import find_build
    from rankship_pipeline.foundation.codec import encode
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store
    from rankship_pipeline.verbs import prepare_recipe
    from rankship_targets.session.runner import HostRunner

    steps, store = Steps(), Store(arguments.store)
    prepared = prepare_recipe(arguments.recipe, steps)
    build, _ = find_build(prepared, store)
    made = prepared.recipe.export.formats
    if lacking := sorted(set(arguments.formats or ()) - set(made)):
        raise InputError(f"--formats: {', '.join(lacking)} was not built", hint=f"the recipe exports {', '.join(made)}")
    choice = TextChoice(
        windows=arguments.windows,
        formats=arguments.formats or made,
        tasks=tuple(filter(None, map(str.strip, (arguments.tasks or "").split(",")))),
        task_folder=arguments.task_folder or Path(),
        limit=arguments.limit,
    )
    rows = tuple(evaluate_build(prepared, build, store, steps, HostRunner(), choice))
    console = Console(highlight=False)
    console.print(tabulate(rows))
    first = rows[0].perplexity
    console.print(f"perplexity of {first.scored_tokens:,} tokens in windows of {first.length_tokens}", markup=False)
    if arguments.to is not None:
        write_atomic(arguments.to, encode(rows).encode())
        console.print(str(arguments.to), soft_wrap=True, markup=False)
    return 0


def tabulate(rows: "Sequence[Evaluated]") -> "Table":
    """A row for each model and file: perplexity with its interval, and every task's metric with its standard error."""
    from rankship_pipeline.foundation.console import start_table

    table = start_table("model", "in", "perplexity", "95 %", *(f"{one.task} {one.metric}" for one in rows[0].tasks))
    for row in rows:
        found = row.perplexity
        low, high = found.low, found.high
        table.add_row(
            row.variant if row.precision == "float32" else f"{row.variant}, {row.precision}",
            row.runner,
            f"{found.perplexity:.4g}",
            "–" if low is None or high is None else f"[{low:.4g}, {high:.4g}]",
            *(f"{one.value:.4g}" + ("" if one.stderr is None else f" ± {one.stderr:.2g}") for one in row.tasks),
        )
    return table
