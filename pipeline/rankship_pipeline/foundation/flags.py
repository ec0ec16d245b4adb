"""Starts every verb's argument parser, and defines the flags that several verbs share."""

import argparse
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.store import default_root, parse_folder


def parse_formats(text: str) -> tuple[Format, ...]:
    """Parse formats separated by commas; returned in the order of FORMATS."""
    named = {name.strip() for name in text.split(",")}
    unknown = sorted(named - set(FORMATS))
    if unknown:
        raise InputError(f"--formats: unknown {', '.join(map(repr, unknown))}", hint=f"known: {', '.join(FORMATS)}")
    return tuple(known for known in FORMATS if known in named)


VERBOSE = "--verbose"
RESULTS = Path("rankship-results")
# flag → arguments of add_argument; the default of --store depends on the environment and is added by `share`
_SHARED: dict[str, dict[str, Any]] = {
    VERBOSE: {
        "action": "store_true",
        "help": "show every caution, and the warnings of the libraries underneath",
    },
    "--on": {"required": True, "metavar": "DEVICE", "help": "devices of the inventory, separated by commas"},
    "--inventory": {
        "type": Path,
        "default": None,
        "metavar": "FILE",
        "help": "inventory of devices (default: $RANKSHIP_DEVICES, else the user's own)",
    },
    "--scheduler": {
        "default": None,
        "metavar": "ADDRESS",
        "help": "measure on the hosts of a rack, which this Dask scheduler knows (tcp://HOST:8786)",
    },
    "--keys": {
        "type": Path,
        "default": None,
        "metavar": "FOLDER",
        "help": "a rack's keys (default: $RANKSHIP_RACK, else the user's own, if they exist)",
    },
    "--results": {"type": parse_folder, "default": RESULTS, "metavar": "FOLDER", "help": "default: %(default)s"},
    "--formats": {
        "type": parse_formats,
        "metavar": "A,B",
        "help": f"of {', '.join(FORMATS)} (default: all for which everything is installed)",
    },
    "--profile": {
        "type": Path,
        "default": None,
        "metavar": "FILE",
        "help": "write where time and memory went, by stage and by layer (JSON)",
    },
    "--store": {"type": parse_folder, "metavar": "FOLDER", "help": "artifact store (default: %(default)s)"},
}
Verb = Callable[[list[str]], int]
_finding_parser: ContextVar[bool] = ContextVar("finding_parser", default=False)


class _Found(Exception):
    """Carries a parser out of its verb."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def start_parser(verb: str, description: str, *shared: str, **more: Any) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's own
    """Start a verb's parser with the named shared flags; `more` goes to ArgumentParser."""
    parents = [*more.pop("parents", ()), share(*shared)]
    return argparse.ArgumentParser(prog=f"rankship {verb}", description=description, parents=parents, **more)


def share(*names: str, again: bool = False) -> argparse.ArgumentParser:
    """A parent parser with --verbose and the named flags; `again` leaves out defaults, for a subcommand."""
    parent = argparse.ArgumentParser(add_help=False)
    for name in (VERBOSE, *names):
        given = {"default": default_root()} | _SHARED[name] if name == "--store" else _SHARED[name]
        parent.add_argument(name, **(given | {"default": argparse.SUPPRESS} if again else given))
    return parent


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a verb's arguments; every verb calls this before it does anything else."""
    if _finding_parser.get():
        raise _Found(parser)
    return parser.parse_args(argv)


def find_parser(verb: Verb) -> argparse.ArgumentParser:
    """The parser that a verb makes: runs the verb up to its call of `parse`."""
    token = _finding_parser.set(True)
    try:
        verb([])
    except _Found as found:
        return found.parser
    finally:
        _finding_parser.reset(token)
    raise TypeError(f"{verb.__name__} does not read its arguments by flags.parse")
