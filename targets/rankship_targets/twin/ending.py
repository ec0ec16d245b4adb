"""Ending a stand-in: its first process is asked to end, and everything of it ends with that."""

import subprocess

STOP_TIMEOUT_S = 20.0


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, by its stdin where we hold that, and kill it where it does not; twice is allowed."""
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
