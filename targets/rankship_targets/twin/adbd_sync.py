"""adbd's file service: status, listing, reading and writing, in the first version and the announced second ones.

The daemon runs inside the device's root as the shell's user, so that the kernel decides what may be read and written.
"""

import errno
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rankship_targets.twin.adbd_wire import Stream

MAX_DATA_BYTES = 1 << 16
_HEAD = struct.Struct("<4sI")
_NO_FILE = (0,) * 10


async def serve_files(stream: Stream) -> None:
    """Answer requests until the other side sends QUIT or closes."""
    while True:
        tag, size = _HEAD.unpack(await stream.read_exactly(_HEAD.size))
        if tag == b"QUIT":
            return
        argument = os.fsdecode(await stream.read_exactly(size))
        if tag == b"STAT":
            await stream.write(b"STAT" + _describe_briefly(argument))
        elif tag in {b"STA2", b"LST2"}:
            await stream.write(_describe(tag, argument, follow=tag == b"STA2"))
        elif tag in {b"LIST", b"LIS2"}:
            await stream.write(_list(argument, briefly=tag == b"LIST"))
        elif tag == b"RECV":
            await _give(stream, argument)
        elif tag == b"SEND":
            await _take(stream, argument)
        else:
            await _fail(stream, f"unknown command {tag!r}")
            return


def _describe_briefly(path: str) -> bytes:
    try:
        found = os.lstat(path)
    except OSError:
        return struct.pack("<III", 0, 0, 0)
    return struct.pack("<III", found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime))


def _describe(tag: bytes, path: str, *, follow: bool) -> bytes:
    values: tuple[int, ...] = _NO_FILE
    error = 0
    try:
        found = os.stat(path, follow_symlinks=follow)  # noqa: PTH116 - names that are not UTF-8
        times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
        owner = (found.st_nlink, found.st_uid, found.st_gid, found.st_size)
        values = (found.st_dev, found.st_ino, found.st_mode, *owner, *times)
    except OSError as failure:
        error = failure.errno or 0
    return struct.pack("<4sIQQIIIIQqqq", tag, error, *values)


def _list(folder: str, *, briefly: bool) -> bytes:
    names: list[str] = []
    with suppress(OSError):
        names = [".", "..", *sorted(os.listdir(folder))]  # noqa: PTH208 - as above
    entries = b""
    for name in names:
        path, raw = f"{folder}/{name}", os.fsencode(name)
        entry = b"DENT" + _describe_briefly(path) if briefly else _describe(b"DNT2", path, follow=False)
        entries += entry + struct.pack("<I", len(raw)) + raw
    return entries + b"DONE" + bytes(16 if briefly else 72)


async def _give(stream: Stream, path: str) -> None:
    """Send a file's content."""
    try:
        file = _open(path)
    except OSError as failure:
        await _fail(stream, f"failed to open file {path}: {failure.strerror}")
        return
    with file:
        while content := file.read(MAX_DATA_BYTES):
            await stream.write(_HEAD.pack(b"DATA", len(content)) + content)
    await stream.write(_HEAD.pack(b"DONE", 0))


def _open(path: str) -> BinaryIO:
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return Path(path).open("rb")


async def _take(stream: Stream, argument: str) -> None:
    """Write a file or a link; an error is reported after all data have arrived, as adb expects."""
    path, _, mode_text = argument.rpartition(",")
    mode = int(mode_text)
    problem, file = _create(Path(path), mode)
    link = b""
    while True:
        tag, size = _HEAD.unpack(await stream.read_exactly(_HEAD.size))
        if tag != b"DATA" or size > MAX_DATA_BYTES:
            break
        content = await stream.read_exactly(size)
        link += content if stat.S_ISLNK(mode) else b""
        try:
            if file is not None:
                file.write(content)
        except OSError as failure:
            problem = problem or f"write failed: {failure.strerror}"
    problem = problem or _finish(Path(path), mode, link if file is None else file, size)
    if problem:
        await _fail(stream, problem)
    else:
        await stream.write(_HEAD.pack(b"OKAY", 0))


def _create(path: Path, mode: int) -> tuple[str, BinaryIO | None]:
    """Make the folders above and the file; returns what went wrong, and the open file (None for a link)."""
    try:
        path.parent.mkdir(mode=0o775, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return "", None if stat.S_ISLNK(mode) else path.open("wb")
    except OSError as failure:
        return f"couldn't create file: {failure.strerror}", None


def _finish(path: Path, mode: int, content: BinaryIO | bytes, mtime_s: int) -> str:
    """Make the link, or close the file and set its permissions and time; returns what went wrong."""
    try:
        if isinstance(content, bytes):
            path.symlink_to(os.fsdecode(content.rstrip(b"\0")))
        else:
            content.close()
            path.chmod(stat.S_IMODE(mode) & 0o777 | (mode & 0o700) >> 3)
            os.utime(path, (mtime_s, mtime_s))
    except OSError as failure:
        return f"write failed: {failure.strerror}"
    return ""


async def _fail(stream: Stream, message: str) -> None:
    raw = os.fsencode(message)
    await stream.write(_HEAD.pack(b"FAIL", len(raw)) + raw)
