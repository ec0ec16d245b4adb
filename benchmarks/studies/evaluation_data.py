"""The folder of evaluation data, named by RANKSHIP_DATA."""

import os
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError


def find_data(path: str) -> Path:
    """A file of the evaluation data; an InputError names the variable and the file where it is missing."""
    folder = os.environ.get("RANKSHIP_DATA")
    if not folder:
        raise InputError(
            f"RANKSHIP_DATA is not set, {path} is needed", hint="set RANKSHIP_DATA to the folder of evaluation data"
        )
    found = Path(folder) / path
    if not found.is_file():
        raise InputError(
            f"RANKSHIP_DATA={folder} has no {path}", hint="set RANKSHIP_DATA to the folder of evaluation data"
        )
    return found
