"""Measures one case in this process and writes what was found: `python -m speed.child SUBJECT SIZE OUT`."""

import importlib
import sys
from pathlib import Path

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import RankshipError
from rankship_pipeline.foundation.files import write_atomic
from speed.records import Measured, Size
from speed.subjects import SUBJECTS


def measure(subject: str, size: Size) -> Measured:
    """Measure one case here."""
    module, _, name = SUBJECTS[subject].measure.partition(":")
    case = SUBJECTS[subject].cases[size]
    found: Measured = getattr(importlib.import_module(f"speed.{module}"), name)(case.rounds, **case.arguments)
    return found


def main(subject: str, size: Size, out: str) -> int:
    """Measure and write; an error's message goes to standard error, its status is the exit status."""
    try:
        measured = measure(subject, size)
    except RankshipError as failure:
        sys.stderr.write(f"{failure}\n")
        return failure.exit_code
    write_atomic(Path(out), encode(measured).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type]  # three words, from run.py
