"""The verb `completion`: prints a shell's completion script for verbs and flags, made from the verbs' parsers."""

import argparse
import sys
from pathlib import Path

from rankship_pipeline.cli import VERBS, find_verb
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.flags import find_parser, parse, start_parser

SHELLS = {
    "bash": 'eval "$(rankship completion bash)"    # in ~/.bashrc',
    "zsh": 'rankship completion zsh >"${fpath[1]}/_rankship"    # once; or any other folder of $fpath',
    "fish": "rankship completion fish >~/.config/fish/completions/rankship.fish    # once",
}


def completion(argv: list[str]) -> int:
    """`rankship completion bash|zsh|fish`: print the script for that shell."""
    lines = "\n".join(f"  {line}" for line in SHELLS.values())
    parser = start_parser(
        "completion",
        "Print a script that makes a shell complete verbs and flags.",
        epilog=f"To use it:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=tuple(SHELLS))
    arguments = parse(parser, argv)
    try:
        import shtab
    except ImportError as failure:
        raise InputError(f"completion scripts need shtab: {failure}", hint="pip install shtab") from failure

    sys.stdout.write(shtab.complete(join_parsers(), arguments.shell) + "\n")
    return 0


def join_parsers() -> argparse.ArgumentParser:
    """One parser with every verb and its flags; path arguments complete as files."""
    root = argparse.ArgumentParser(prog="rankship", description="Ship low-rank models to the edge and measure them.")
    root.add_argument("--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(dest="verb")
    for name, (_, summary) in VERBS.items():
        parser = find_parser(find_verb(name))
        _mark_paths(parser)
        verbs.add_parser(name, help=summary, description=summary, parents=[parser], add_help=False)
    return root


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    """Mark the arguments that are files or folders for shtab, also in subcommands."""
    import shtab

    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to list them
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # as shtab documents
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for inner in dict.fromkeys(action.choices.values()):
                _mark_paths(inner)
