"""The verb `merge`: checkpoints on disk into one, without data and without loading them whole."""

import argparse
import sys
from pathlib import Path


def merge(argv: list[str]) -> int:
    """`rankship merge FILE --to FOLDER`: prints the new folder on stdout; the same command resumes."""
    parser = argparse.ArgumentParser(
        prog="rankship merge", description="Merge safetensors checkpoints into one folder, streaming; resumes by shard."
    )
    parser.add_argument("file", type=Path, help="a TOML file: models, base, [merge], dtype, seed")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="the folder to make; must not exist")
    arguments = parser.parse_args(argv)

    from rankship_pipeline.recipe.merge_file import read_merge_file

    asked = read_merge_file(arguments.file)  # before torch is imported: a typing mistake is told at once

    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.files import ensure_writable

    ensure_writable(arguments.to.absolute().parent, "--to")

    from rankship_pipeline.stream.merge import merge_checkpoints

    merge_checkpoints(asked, arguments.file.resolve().parent, arguments.to.absolute(), Steps())
    sys.stdout.write(f"{arguments.to}\n")
    return 0
