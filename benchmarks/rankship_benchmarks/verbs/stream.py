"""`rankship compress --stream`: a language model larger than memory, block by block, from its folder to a folder."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.units import show_percent
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice, Sensitivity
from rankship_pipeline.recipe.draft import KEPT, take_budget
from rankship_pipeline.recipe.rank_methods import RANK_METHODS

if TYPE_CHECKING:
    from rankship_pipeline.stream.job import StreamJob, StreamReport

_METHODS = tuple(name for name, traits in RANK_METHODS.items() if traits.reads == "spectra")
_SENSITIVITIES = tuple(name for name in get_args(Sensitivity) if name != "kl")
_BUDGETS = ("kept_parameters", "parameters")
# Flags of `compress` that say nothing of a stream.
_OTHERS = (
    *("images", "csv", "label", "columns", "size", "channels", "merge", "costs", "on", "formats", "inventory"),
    *("precision", "size_bytes", "kept_flops", "flops", "latency_us", "latency_ms", "energy_uj"),
)
_OWN = ("test_text", "method", "sensitivity", "step", "workers", "scheduler", "work")


def add_stream_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a stream; those of texts and budgets are `compress`'s own."""
    group = parser.add_argument_group(
        "larger than memory",
        "with --stream only one block of a language model is in memory, and the new folder holds that model"
        " in safetensors, which `rankship.load` reads; exporting it is another command",
    )
    group.add_argument("--stream", action="store_true", help="block by block; stopped, the same command goes on")
    group.add_argument(
        "--test-text", type=Path, metavar="FILE", help="for perplexity (default: what follows in --text)"
    )
    group.add_argument("--method", choices=_METHODS, help="of allocating ranks (default: knapsack)")
    group.add_argument(
        "--sensitivity",
        choices=_SENSITIVITIES,
        help="how errors count: relative to a layer's output, or by their effect on predictions, which takes a second"
        " pass (default: auto, by effect)",
    )
    group.add_argument("--step", type=int, metavar="N", help="ranks are multiples of this (default: 8)")
    group.add_argument(
        "--workers", type=int, metavar="N", help="decompositions at once (default: one per core, up to 4)"
    )
    group.add_argument("--scheduler", metavar="URL", help="tcp://…: a Dask cluster decomposes, on a network you trust")
    group.add_argument("--work", type=Path, metavar="FOLDER", help="keep intermediate files there, for other budgets")


def refuse_stream_flags(arguments: argparse.Namespace) -> None:
    """InputError for a flag that only a stream takes."""
    _refuse(arguments, _OWN, "needs --stream", "add --stream, or leave it out")


def stream_model(arguments: argparse.Namespace) -> None:
    """Carry out what the flags say, and print the report."""
    job = draft_job(arguments)

    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.stream.job import compress_stream

    report = compress_stream(job, arguments.to, Steps(), arguments.work)
    print_stream(report, arguments.to)


def draft_job(arguments: argparse.Namespace) -> "StreamJob":
    """The job that the command line describes."""
    _refuse(arguments, _OTHERS, "does not go with --stream", "leave it out")
    if len(arguments.models) > 1:
        raise InputError(
            f"--stream compresses one model, got {len(arguments.models)}",
            hint="merge them first: `rankship merge FILE --to FOLDER` streams too",
        )
    if arguments.text is None:
        raise InputError(
            "--stream needs a text to calibrate with and to test by", hint="name one: --text FILE (.txt or .jsonl)"
        )
    for name in ("tokens", "calibration_samples", "test_samples", "step", "workers"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}", hint="give a number above zero")

    from rankship_pipeline.stream.choice import StreamChoice
    from rankship_pipeline.stream.job import StreamJob

    keys = {
        "tokens": arguments.tokens,
        "samples": arguments.calibration_samples,
        "test_samples": arguments.test_samples,
    }
    ranks = {"method": arguments.method, "sensitivity": arguments.sensitivity, "step": arguments.step}
    return StreamJob(
        model=arguments.models[0],
        text=arguments.text,
        test_text=arguments.test_text,
        budget=Budget(**take_budget(arguments, Path()) or {"kept_parameters": KEPT}),  # type: ignore[arg-type]
        ranks=RankChoice(**_given(ranks)),  # type: ignore[arg-type]
        how=StreamChoice(workers=arguments.workers, scheduler=arguments.scheduler),
        **_given(keys),  # type: ignore[arg-type]
    )


def _given(keys: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in keys.items() if value is not None}


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str, hint: str) -> None:
    for name in names:
        if getattr(arguments, name) not in {None, ()}:
            raise InputError(f"--{name.replace('_', '-')} {why}", hint=hint)


def print_stream(report: "StreamReport", folder: Path) -> None:
    """Print what became of the model: its size, its perplexity before and after, and how to go on."""
    from rich.console import Console

    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    share = report.parameters / report.dense_parameters
    say(
        f"{report.parameters:,} of {report.dense_parameters:,} parameters ({show_percent(share)};"
        f" budget {report.budget_parameters:,}); {report.factored} of {report.layers} layers are pairs now"
    )
    for name, one in (("before", report.before), ("after", report.after)):
        interval = "" if one.low is None else f" [{one.low:.4g}, {one.high:.4g}]"
        say(
            f"perplexity {name}: {one.perplexity:.4g}{interval}, {one.scored_tokens:,} tokens in windows of"
            f" {one.length_tokens}, stride {one.stride_tokens}"
        )
    for doubt in report.doubts:
        say(f"note: {doubt}")
    say(f"{folder}: rankship.load({shlex.quote(str(folder))!r}) is the model in torch")
