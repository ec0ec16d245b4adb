"""The verb `completion`: a script by which a shell completes verbs and flags, made from the verbs' own parsers."""

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
        "Print a script by which a shell completes verbs and flags.",
        epilog=f"To use it:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=tuple(SHELLS))
    arguments = parse(parser, argv)
    try:
        import shtab
    except ImportError as failure:
        raise InputError(f"scripts are made by shtab: {failure}", hint="pip install shtab") from failure

    sys.stdout.write(shtab.complete(join_parsers(), arguments.shell) + "\n")
    return 0


def join_parsers() -> argparse.ArgumentParser:
    """One parser that knows every verb with its flags; paths are completed as such."""
    root = argparse.ArgumentParser(prog="rankship", description="Ship low-rank models to the edge and measure them.")
    root.add_argument("--version", action="store_true", help="print the version")
    verbs = root.add_subparsers(dest="verb")
    for name, (_, summary) in VERBS.items():
        parser = find_parser(find_verb(name))
        _mark_paths(parser)
        verbs.add_parser(name, help=summary, description=summary, parents=[parser], add_help=False)
    return root


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    """Say to shtab which arguments are files or folders, in a verb's own verbs too."""
    import shtab

    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to list them
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own way
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for inner in dict.fromkeys(action.choices.values()):
                _mark_paths(inner)
