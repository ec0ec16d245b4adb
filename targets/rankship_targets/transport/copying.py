"""Copies files to a device: only missing ones, each complete or not at all, and resumed after a broken connection.

A file is written to a part, named after its target and content, checked by its hash and renamed. A part that a broken
connection left is continued by the next try, if its hash is right so far.
"""

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rankship_pipeline.foundation.errors import CommandFailed, InputError, NoSpace, PersistentTargetError, TargetError
from rankship_pipeline.foundation.units import show_bytes
from rankship_targets.transport.protocol import (
    Transport,
    explain_failure,
    hash_many,
    hash_remote,
    make_batches,
    open_source,
    run_checked,
)
from rankship_targets.transport.receiving import limit_hash_s, receive

RESUMED_FROM_BYTES = 1 << 20  # checking the part of a smaller file takes longer than sending it again
SHOWN_FROM_BYTES = 2_000_000
PARTS_AGE_MINUTES = 24 * 60
NO_FOLDER = 73  # an exit status of this script's own, which no shell and no `mkdir` uses
_CHUNK = 1 << 20
_PART = "*." + "[0-9a-f]" * 16 + ".part"
# Makes the part's folder, reads its length once and hashes that many bytes: another host may be appending to it.
LOOK = f'mkdir -p -- "$2" || exit {NO_FOLDER}; n=$(stat -c %s -- "$1") && echo "$n" && head -c "$n" < "$1" | sha256sum'

OnProgress = Callable[[int, int], None]  # (bytes there or on their way, bytes in total)


def copy_verified(
    transport: Transport, local: Path, remote: str, sha256: str, *, on_progress: OnProgress | None = None
) -> bool:
    """Copy `local` to `remote`, unless it has the content with this hash already; returns whether it was copied.

    A reader on the device sees the old file or the complete new one.
    """
    return bool(copy_many(transport, {remote: (local, sha256)}, on_progress=on_progress))


def copy_many(
    transport: Transport, files: Mapping[str, tuple[Path, str]], *, on_progress: OnProgress | None = None
) -> tuple[str, ...]:
    """Copy each file whose remote path has not the content with its hash; returns the paths that were copied.

    The paths are all absolute or all relative. `on_progress` is called for copies large enough to take noticeable time.
    """
    sizes = {remote: _size(local) for remote, (local, _) in files.items()}
    copied = missing = _find_missing(transport, files, sizes)
    for _ in range(2):  # a part that another host removed or damaged is sent again
        if missing:
            missing = _find_missing(transport, _copy_parts(transport, missing, sizes, on_progress), sizes)
    if not missing:
        return tuple(copied)
    (remote, (local, sha256)), *_ = missing.items()
    arrived = hash_remote(transport, remote)
    message = f"{local.name} did not arrive at {remote}: SHA-256 there is {arrived}, expected {sha256}"
    raise CommandFailed(message, hint="the local file changed or the copy was damaged: copy again")


def name_part(remote: str, sha256: str) -> str:
    """Return the path of the part for this content at `remote`; the same for every try and host."""
    folder, name = posixpath.split(remote)
    # File systems allow names of 255 bytes, and the suffix takes 22.
    return posixpath.join(folder, f"{name.encode()[:200].decode(errors='ignore')}.{sha256[:16]}.part")


def remove_old_parts(transport: Transport, folder: str, *, age_minutes: int = PARTS_AGE_MINUTES) -> None:
    """Remove the parts below `folder` that have not been continued for `age_minutes`."""
    old = ["-name", _PART, "-type", "f", "-mmin", f"+{age_minutes}"]
    run_checked(transport, ["find", _shield(folder), *old, "-exec", "rm", "-f", "--", "{}", "+"])


def _copy_parts(
    transport: Transport,
    files: Mapping[str, tuple[Path, str]],
    sizes: Mapping[str, int],
    on_progress: OnProgress | None,
) -> dict[str, tuple[Path, str]]:
    """Send the missing files; returns those that arrived damaged and were not renamed.

    After an error that trying again cannot cure, no part stays; after a broken connection, all stay for the next try.
    """
    parts = {remote: name_part(remote, sha256) for remote, (_, sha256) in files.items()}
    small = {posixpath.dirname(remote) or "." for remote in files if sizes[remote] < RESUMED_FROM_BYTES}
    for batch in make_batches(sorted(small)):
        run_checked(transport, ["mkdir", "-p", "--", *batch])
    wrong = {}
    try:
        begun = {remote: _begin(transport, files[remote][0], part, sizes[remote]) for remote, part in parts.items()}
        _check_room(transport, files, _sum_up(sizes, files) - sum(begun.values()))
        bar = _Bar(on_progress, _sum_up(sizes, files))
        for remote, (local, sha256) in files.items():
            offset = begun[remote]
            if sha256 != receive(
                transport, local, parts[remote], offset=offset, sha256=sha256, place=remote, on_progress=bar.move
            ):
                wrong[remote] = files[remote]
            bar.base_bytes += sizes[remote]
        _remove(transport, [parts[remote] for remote in wrong])
    except PersistentTargetError:
        with suppress(TargetError):
            _remove(transport, list(parts.values()))
        raise
    return wrong


class _Bar:
    """Adds up the bytes of several files for one progress bar."""

    def __init__(self, on_progress: OnProgress | None, total_bytes: int) -> None:
        self.base_bytes = 0
        self._on_progress = on_progress if total_bytes >= SHOWN_FROM_BYTES else None
        self._total_bytes = total_bytes

    def move(self, sent_bytes: int) -> None:
        """Report how much of the current file is on its way."""
        if self._on_progress:
            self._on_progress(self.base_bytes + sent_bytes, self._total_bytes)


def _find_missing(
    transport: Transport, files: Mapping[str, tuple[Path, str]], sizes: Mapping[str, int]
) -> dict[str, tuple[Path, str]]:
    found = hash_many(transport, list(files), timeout_s=limit_hash_s(_sum_up(sizes, files))) if files else {}
    return {remote: (local, sha256) for remote, (local, sha256) in files.items() if found.get(remote) != sha256}


def _begin(transport: Transport, local: Path, part: str, size: int) -> int:
    """Return how many bytes of a part are right; a wrong part is removed."""
    if size < RESUMED_FROM_BYTES:
        return 0
    folder = posixpath.dirname(part) or "."
    done = transport.run(["sh", "-c", LOOK, "sh", part, folder], timeout_s=limit_hash_s(size))
    if done.code == NO_FOLDER:
        raise explain_failure(["mkdir"], done.code, done.stderr)
    if not done.stdout and done.code != 0:
        return 0
    match = re.fullmatch(r"([0-9]{1,18})\n\\?([0-9a-f]{64})\s.*\s*", done.stdout)
    if match and int(match[1]) <= size and _hash_start(local, int(match[1])) == match[2]:
        return int(match[1])
    _remove(transport, [part])
    return 0


def _hash_start(local: Path, length: int) -> str:
    known, left = hashlib.sha256(), length
    with open_source(local) as source:
        while left and (chunk := source.read(min(_CHUNK, left))):
            known.update(chunk)
            left -= len(chunk)
    return known.hexdigest()


def _check_room(transport: Transport, files: Mapping[str, tuple[Path, str]], needed: int) -> None:
    folder = posixpath.commonpath([posixpath.dirname(remote) for remote in files]) or "."
    free = transport.free_bytes(folder)
    if free < needed:
        names = [local.name for local, _ in files.values()]
        what = f"{names[0]} needs" if len(names) == 1 else f"{len(names)} files need"
        message = f"{folder} has {show_bytes(free)} free, {what} {show_bytes(needed)}"
        raise NoSpace(message, hint="free space on the device or choose another workdir in the inventory")


def _remove(transport: Transport, names: Sequence[str]) -> None:
    for batch in make_batches(names):
        run_checked(transport, ["rm", "-f", "--", *batch])


def _shield(name: str) -> str:
    """Prefix a name that begins with a dash, so that it is not taken for an option."""
    return f"./{name}" if name.startswith("-") else name


def _sum_up(sizes: Mapping[str, int], files: Iterable[str]) -> int:
    return sum(sizes[remote] for remote in files)


def _size(local: Path) -> int:
    try:
        return local.stat().st_size
    except OSError as failure:
        raise InputError(f"cannot read {local}: {failure.strerror}", hint="name a file that exists") from None
