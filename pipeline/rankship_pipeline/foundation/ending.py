"""Ends a process after what is no error of ours: a mistake in the program, a full disk or memory, a closed pipe.

Status 1 is left to verdicts: a script that reads it as "a case is worse" must never see a crash.
"""

import errno
import io
import os
import select
import sys
import sysconfig
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

INPUT, BUILD = 2, 3  # the statuses of InputError and BuildError
BUG, INTERRUPTED, UNREAD = 70, 130, 141  # sysexits' EX_SOFTWARE; 128 + SIGINT; 128 + SIGPIPE
_PACKAGES = {"rankship", "rankship_pipeline", "rankship_targets", "rankship_benchmarks"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
# Only with a file's name: without one they may come from anything.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
_ADVICE = {
    errno.EISDIR: "this is a folder: name a file, or move the folder away, then run again",
    errno.ENOTDIR: "a part of this path is a file: name a folder, then run again",
    errno.EEXIST: "a file stands where a folder should be: name another, then run again",
    errno.ENAMETOOLONG: "choose a shorter path, then run again",
    errno.EIO: "the disk reports faults (`dmesg` names them): use another folder, then run again",
}


def end_after(error: BaseException) -> int:
    """Say on stderr what ended the process and what to do; returns its exit status."""
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted; finished work is kept, run the same command to resume")
        return INTERRUPTED
    if isinstance(error, OSError) and _is_hosts(error):
        named = f": {error.filename}" if error.filename else ""
        hint = _ADVICE.get(error.errno or 0, "free space or allow writing there, then run again")
        _say(f"{error.strerror}{named}\n  → {hint}")
        return INPUT
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        _say(
            f"this machine's memory is full: {str(error).splitlines()[0] if str(error) else 'no allocation succeeds'}\n"
            "  → stop other programs, or give the recipe fewer or shorter samples; finished work is kept"
        )
        return BUILD
    with suppress(BrokenPipeError):
        traceback.print_exception(error)
    own = find_users_frame(error)
    if own is not None:
        _say(
            f"{type(error).__name__} comes from your own {Path(own.filename).name}, line {own.lineno}\n"
            "  → correct it there, then run again; if it is right there, report it with the lines above"
        )
        return INPUT
    _say(
        f"{type(error).__name__} is no error that Rankship expects: this is a mistake in Rankship\n"
        "  → report it with the lines above, the command and, if you may, the files that it read; finished work is kept"
    )
    return BUG


def find_users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame of the user's own code, a recipe's factory or loader, if the error came out of it."""
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    ours = [path for name, one in sys.modules.items() if name in _PACKAGES for path in one.__path__]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = str(Path(frame.filename).absolute())
        if any(path.startswith(f"{folder}{os.sep}") for folder in ours):
            return None
        if Path(path).is_file() and not any(path.startswith(f"{folder}{os.sep}") for folder in libraries):
            return frame
    return None


def _is_hosts(error: OSError) -> bool:
    return error.errno in _FULL or (error.errno in _REFUSED and bool(error.filename))


def is_unread(error: BaseException) -> bool:
    """Return whether the reader of stdout or stderr went away, as `| head` does; such a stream then leads nowhere."""
    # rich's console turns a broken pipe into SystemExit(1), with stdout already led nowhere
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and True in [_lead_nowhere(stream) for stream in (sys.stdout, sys.stderr)]


def _lead_nowhere(stream: TextIO) -> bool:
    """Turn a stream that nobody reads to /dev/null, so that Python's last flush says nothing; False for any other."""
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: a system without poll
        waiting = select.poll()
        waiting.register(stream.fileno(), 0)
        if waiting.poll(0):  # only an error is reported: no reader is left
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            return True
    return False


def show_any_text() -> None:
    """Let stdout show what its encoding lacks as escapes, as stderr does; nor does a closed one end a run."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        sys.stderr.write(f"{text}\n")
