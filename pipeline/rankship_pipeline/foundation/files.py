"""Files that are either whole or absent: written under a temporary name, flushed to disk, then renamed."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError

_CHUNK = 1 << 20


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write `data` to `path` in one step; a reader sees the old content or the new, never a part.

    `mode` are the file's permissions (0o600), set before the data are written; None: the user's default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as stream:
            if mode is not None:
                os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def ensure_writable(folder: Path, flag: str) -> None:
    """Make a folder if it is missing and prove that files can be made in it; else InputError naming the flag."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as failure:
        message = f"cannot write to {folder}: {failure.strerror}"
        raise InputError(message, hint=f"name another folder with {flag}") from None


@contextmanager
def publish_folder(final: Path) -> Iterator[Path]:
    """Yield a private folder to fill; on success it is renamed to `final`, on any error it is deleted.

    If another process has published `final` meanwhile, that one stays (folders are write-once) and ours is deleted.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        flush_folder(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        _flush(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder and every file in it to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success the file is renamed to `path`, on any error it is deleted."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
