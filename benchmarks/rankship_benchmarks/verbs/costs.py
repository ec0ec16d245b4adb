"""The verb `costs`: measures the cost table of a recipe's model on a device."""

from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.files import ensure_writable, write_atomic
from rankship_pipeline.foundation.flags import parse, start_parser
from rankship_pipeline.foundation.formats import FORMATS

if TYPE_CHECKING:
    from rich.table import Table

    from rankship_benchmarks.bundle.suite import EnergyChoice
    from rankship_pipeline.flow.prepared import Prepared
    from rankship_pipeline.foundation.records import CostTable


def costs(argv: list[str]) -> int:
    """`rankship costs RECIPE --on DEVICE`: measure what each layer costs there, dense and at several ranks."""
    parser = start_parser(
        "costs",
        "Time a recipe's layers on a device, dense, factored and in the types of [precision], or measure their energy."
        " Of a language model there is a table for each phase of generating. An interrupted run resumes.",
        "--inventory",
        "--results",
        "--store",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--on", required=True, metavar="DEVICE", help="one device of the inventory")
    parser.add_argument("--format", choices=FORMATS, default=None, help="default: the first that the recipe exports")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=Path("cost-table.json"), help="default: %(default)s")
    help_ = "of a language model: the length of the prompt; default: that of the recipe's budget, or 128"
    parser.add_argument("--prompt-tokens", type=int, default=None, metavar="N", help=help_)
    help_ = "measure energy too, as [energy] of this suite says, and write the table in µJ; takes hours"
    parser.add_argument("--energy", type=Path, metavar="SUITE", help=help_)
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_pipeline.foundation.codec import encode
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.errors import InputError
    from rankship_pipeline.foundation.store import Store
    from rankship_pipeline.verbs import prepare_recipe
    from rankship_targets.devices.device import find_device

    if arguments.threads < 1:
        raise InputError(f"--threads must be at least 1, got {arguments.threads}", hint="give a number of threads")
    device, steps, store = find_device(arguments.on, arguments.inventory), Steps(), Store(arguments.store)
    choice = None if arguments.energy is None else read_energy_choice(arguments.recipe, arguments.energy)
    prepared = prepare_recipe(arguments.recipe, steps)
    parts = list_parts(prepared, arguments.prompt_tokens, with_energy=choice is not None)

    from rankship_benchmarks.costs.energy_table import measure_energies
    from rankship_benchmarks.costs.runtime_on_device import choose_place
    from rankship_benchmarks.costs.time_table import measure_costs  # after the recipe was read: this imports torch
    from rankship_targets.devices.quarantine import watching
    from rankship_targets.session.session import open_session

    ensure_writable(arguments.store, "--store")
    ensure_writable(arguments.results, "--results")
    ensure_writable(arguments.to.resolve().parent, "--to")
    with watching(device), open_session(device, on_news=steps.note) as session:
        format_ = arguments.format or prepared.recipe.export.formats[0]
        for part, prompt_tokens in parts:
            place = choose_place(session, format_, arguments.threads, part, prompt_tokens)
            if choice is None:
                table = measure_costs(prepared, store, place, arguments.results, steps)
            else:
                table = measure_energies(prepared, store, place, arguments.results, steps, choice)
            path = arguments.to if len(parts) == 1 else name_table(arguments.to, part)
            write_atomic(path, encode(table).encode())
            Console(highlight=False).print(tabulate(table))
            steps.note(f"wrote {path}; a recipe names it as budget.costs")
    return 0


def list_parts(prepared: "Prepared", prompt_tokens: int | None, *, with_energy: bool) -> list[tuple[str, int | None]]:
    """Return what is timed of a model, each with the length of its prompt: of a language model its budget's phase.

    Both phases where its budget is for neither. InputError for a prompt that does not fit, and for what has no phases.
    """
    from rankship_pipeline.flow.checks import check_prompt
    from rankship_pipeline.foundation.artifact_key import DECODE, WHOLE, prefill_of
    from rankship_pipeline.foundation.errors import InputError
    from rankship_pipeline.recipe.budget import TOKEN_TIMES

    budget, generation = prepared.recipe.budget, prepared.generation
    if generation is None:
        if prompt_tokens is not None:
            raise InputError("--prompt-tokens belongs to language models", hint="leave it out")
        return [(WHOLE, None)]
    if with_energy:
        raise InputError(
            "--energy is for models of one inference, a language model runs in phases",
            hint="its energy in each phase is measured by a suite with [energy]",
        )
    length = prompt_tokens or budget.prompt
    parts = dict(zip(TOKEN_TIMES, (prefill_of(length), DECODE), strict=True))
    phases = [part for key, part in parts.items() if key in budget.amounts] or list(parts.values())
    for part in phases:
        check_prompt(generation, length, "--prompt-tokens", further=part == DECODE)
    return [(part, length) for part in phases]


def name_table(path: Path, part: str) -> Path:
    """Return the path of one of several tables: "cost-table-prefill-128.json"."""
    return path.with_stem(f"{path.stem}-{part.replace(' ', '-')}")


def read_energy_choice(recipe: Path, suite: Path) -> "EnergyChoice":
    """Return how a suite of this recipe measures energy; InputError if it has no [energy]."""
    from rankship_benchmarks.bundle.suite import read_suite_of
    from rankship_pipeline.foundation.errors import InputError

    choice = read_suite_of(recipe, suite).energy
    if choice is None:
        raise InputError(f"{suite} has no [energy]", hint="add [energy] to it (docs/energy.md)")
    return choice


def tabulate(table: "CostTable") -> "Table":
    """Return the cost table for the terminal, one row per layer; costs below the noise are shown as measured."""
    from rich.markup import escape

    from rankship_pipeline.foundation.artifact_key import describe_timed
    from rankship_pipeline.foundation.console import start_table
    from rankship_pipeline.foundation.units import show_ns

    def show(cost: int) -> str:
        return show_ns(cost) if table.unit == "ns" else f"{cost:,} µJ"

    shown = start_table("layer", "dense", "95 % interval", "other ways, cheapest to dearest")
    for name, (dense, *options) in table.layers.items():
        ordered = sorted(options, key=lambda one: one.cost)
        ends = " to ".join(f"{show(one.cost)} ({one.stored})" for one in (*ordered[:1], *ordered[1:][-1:]))
        offered = f"{len(ordered)} on offer, {ends}" if ordered else "–"
        span = "–" if dense.low is None or dense.high is None else f"{show(dense.low)} to {show(dense.high)}"
        shown.add_row(escape(name), show(dense.cost), span, offered)
    shown.add_row("everything else", show(table.fixed), "", "")
    phase = "" if table.prompt_tokens is None else f", {describe_timed(table.part, table.prompt_tokens)}"
    shown.add_row("the whole dense model", show(table.dense), "", f"{table.format}, {table.runtime}{phase}")
    return shown
