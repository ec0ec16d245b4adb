"""The `rankship` command: a table of verbs, each imported only when it is used."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from rankship_pipeline import __version__
from rankship_pipeline.foundation import ending, quiet
from rankship_pipeline.foundation.errors import InputError, RankshipError

# verb → (module:function, what it does). The function takes the verb's own arguments and returns an exit status.
VERBS: dict[str, tuple[str, str]] = {
    "init": ("rankship_pipeline.verbs:init", "write a commented recipe that builds as it is"),
    "compress": ("rankship_benchmarks.verbs.compress:compress", "turn a model into verified artifacts in one command"),
    "run": ("rankship_benchmarks.verbs.run:run", "build, verify, push, measure and report in one go"),
    "build": ("rankship_pipeline.verbs:build", "merge, compress and export a recipe's models"),
    "merge": ("rankship_pipeline.verbs:merge", "merge checkpoints on disk into one, without data"),
    "verify": ("rankship_benchmarks.verbs.run:verify", "check that every artifact computes the same as torch"),
    "eval": ("rankship_benchmarks.verbs.evaluate:evaluate", "judge a language model and its files on text"),
    "bench": ("rankship_benchmarks.verbs.run:bench", "push verified artifacts to a device and measure them there"),
    "deploy": (
        "rankship_benchmarks.verbs.deploy:deploy",
        "copy verified artifacts to devices and print how to load them",
    ),
    "costs": ("rankship_benchmarks.verbs.costs:costs", "time each layer on a device, for a cost table"),
    "report": ("rankship_benchmarks.verbs.run:report", "write the page and print the table of a finished measurement"),
    "nightly": ("rankship_benchmarks.verbs.nightly:nightly", "build, measure, compare with the nights before, report"),
    "bisect": ("rankship_benchmarks.verbs.bisect:bisect", "find the night between two that made a case slower"),
    "lab": ("rankship_benchmarks.verbs.lab:lab", "draw a page of all devices, cases, nights and runs"),
    "index": ("rankship_benchmarks.verbs.nightly:index", "bring the index over many runs up to date"),
    "export": ("rankship_benchmarks.verbs.nightly:export", "export many runs for a notebook or MLflow"),
    "compare": ("rankship_benchmarks.verbs.compare:compare", "judge a run against an earlier one, case by case"),
    "study": ("rankship_benchmarks.verbs.run:study", "compare compression methods at several budgets and models"),
    "show": ("rankship_pipeline.verbs:show", "print a finished build: ranks, sizes, accuracy"),
    "devices": ("rankship_targets.verbs.devices:devices", "list, add and remove devices"),
    "doctor": ("rankship_targets.verbs.devices:doctor", "find why a device would measure badly, and how to fix it"),
    "worker": ("rankship_benchmarks.verbs.rack:worker", "offer this host's devices to a rack, or make a rack's keys"),
    "scheduler": ("rankship_benchmarks.verbs.rack:scheduler", "join the hosts of a rack: one for all of them"),
    "completion": (
        "rankship_pipeline.completion:completion",
        "print a script that makes a shell complete verbs and flags",
    ),
    "kit": ("rankship_targets.verbs.kit:kit", "build the runtimes that a device needs, and install them there"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; an error prints one message on stderr and sets its exit status (see errors.py)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--verbose" in arguments:
        os.environ[quiet.VERBOSE] = "1"
        arguments = arguments[1:] if arguments[0] == "--verbose" else arguments  # accepted before the verb too
    quiet.silence()
    # torch's threads wait asleep: spinning beside other work they make training ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ending.show_any_text()
    try:
        status = _carry_out(arguments)
        sys.stdout.flush()
    except RankshipError as error:
        hint = f"\n  → {error.hint}" if error.hint else ""
        sys.stderr.write(f"{type(error).__name__}: {error}{hint}\n")
        return error.exit_code
    except BaseException as error:  # whatever it was: status 1 means that a case is worse
        if isinstance(error, SystemExit) and error.code in {None, 0, InputError.exit_code}:
            raise  # argparse, which has said why
        return ending.UNREAD if ending.is_unread(error) else ending.end_after(error)
    return status


def _carry_out(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(describe())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"rankship {__version__}\n")
        return 0
    return find_verb(arguments[0])(arguments[1:])


def find_verb(name: str) -> Callable[[list[str]], int]:
    """Import a verb's function; InputError with the nearest verb if it is unknown."""
    if name not in VERBS:
        import difflib

        nearest = difflib.get_close_matches(name, VERBS, n=1)
        guess = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"unknown verb {name!r}", hint=f"{guess}`rankship --help` lists all verbs")
    module, function = VERBS[name][0].split(":")
    verb: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return verb


def describe() -> str:
    """The text of `rankship --help`."""
    lines = ["usage: rankship VERB ...", "", "Ship low-rank models to the edge and measure them there.", ""]
    lines += [f"  {verb:11}{summary}" for verb, (_, summary) in VERBS.items()]
    lines += ["", "`rankship VERB --help` says more. Exit status: 0 done, 1 a case is worse, 2 input,"]
    lines += ["3 build or parity, 4 device, 5 unusable measurement, 70 a mistake in Rankship, 130 interrupted."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
