"""Ending a stand-in: its first process is asked to end, and everything of it ends with that."""

import shutil
import subprocess
from pathlib import Path

STOP_TIMEOUT_S = 20.0


def end_stand_in(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a stand-in and remove its folder; twice is allowed.

    The process is asked to end, by its stdin where we hold that, and killed where it does not.
    """
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)
