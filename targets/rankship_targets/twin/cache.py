"""The files that stand-ins are made from, in the user's cache: made once, and again if they are damaged."""

import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from rankship_pipeline.foundation.files import write_atomic
from rankship_targets.devices.device import user_folder

_STAMP = "made.json"


def twins_folder() -> Path:
    """Return the folder for all files of stand-ins; it may be deleted while none runs."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "rankship" / "twins"


def find_storage(name: str) -> Path:
    """Return where a device of this name keeps its files from one process to the next: kit, artifacts, results."""
    return twins_folder() / "storage" / quote(name, safe="")


def find_or_make(name: str, made_of: str, make: Callable[[Path], None]) -> Path:
    """Return the folder that `make` fills, complete: if two processes need it, one makes it and the other waits.

    `made_of` is a text that changes with everything that goes into the folder.
    """
    folder = twins_folder() / f"{name}-{sha256(made_of.encode()).hexdigest()[:16]}"
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not _is_whole(folder):
            _make_anew(folder, make)
    return folder


def print_news(news: str) -> None:
    """Report a slow step on stderr; because of the cache, each happens only once."""
    print(f"stand-in: {news}", file=sys.stderr, flush=True)  # noqa: T201 - it is for the user


def _make_anew(folder: Path, make: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # from a process that was killed: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)  # a program that it had started may still be writing there
    if folder.exists():
        print_news(f"{folder} is damaged and is made again")
        shutil.rmtree(folder)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        make(temporary)
        write_atomic(temporary / _STAMP, json.dumps({"listing": _hash_listing(temporary)}).encode())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == {"listing": _hash_listing(folder)})


def _hash_listing(folder: Path) -> str:
    """Return the SHA-256 of all names, types, sizes and permissions: a lost or partly written file changes it."""
    lines = []
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(where, name)  # noqa: PTH118 - thousands of names, at every start
            found = os.lstat(path)
            size = 0 if name in folders else found.st_size
            lines.append(f"{os.path.relpath(path, folder)}\0{found.st_mode:o}\0{found.st_uid}\0{size}")
    lines = [line for line in lines if not line.startswith(f"{_STAMP}\0")]
    return sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, which ends with the process at the latest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_news(f"waiting for another process that makes or checks {path.stem}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
