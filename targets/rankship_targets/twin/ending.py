"""Ends a stand-in: all its processes end with its first one."""

import shutil
import subprocess
from pathlib import Path

STOP_TIMEOUT_S = 20.0


def end_stand_in(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a stand-in and remove its folder; ending it twice is allowed.

    The process is asked to end, by closing its stdin or by SIGTERM, and killed if it does not end in time.
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
