"""How files get to a device: only what is missing, whole or not at all, and on from where a broken copy stopped.

A file is written under a name of its own for its place and content, checked there and renamed. What a broken
connection left under that name is the beginning of the next try, if its hash says so.
"""

import hashlib
import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rankship_pipeline.errors import CommandFailed, InputError, NoSpace, PersistentTargetError, TargetError
from rankship_pipeline.units import show_bytes
from rankship_targets.transport import (
    STEP_TIMEOUT_S,
    Transport,
    hash_many,
    hash_remote,
    make_batches,
    open_source,
    run_checked,
)

RESUMED_FROM_BYTES = 1 << 20  # looking at what is left of a smaller file takes longer than sending it again
SHOWN_FROM_BYTES = 2_000_000
PIECE_BYTES = 16 << 20
PARTS_AGE_MINUTES = 24 * 60
_SLOWEST_BYTES_PER_S = 5_000_000  # a worn SD card, read or hashed
_CHUNK = 1 << 20
_PIECE_SUFFIX = ".piece"
_PART = "*." + "[0-9a-f]" * 16 + ".part"
# One look at the length and the hash of that many bytes: another host may be writing on.
LOOK = 'n=$(stat -c %s -- "$1") && echo "$n" && head -c "$n" < "$1" | sha256sum'
RENAME = (
    'while [ $# -gt 0 ]; do if [ -d "$2" ]; then echo "$2: Is a directory" >&2; exit 1; fi; '
    'mv -f -- "$1" "$2" || exit; shift 2; done'
)
APPEND = 'cat < "$1" >> "$2" && rm -f -- "$1"'

Told = Callable[[int, int], None]  # (bytes that are there or on their way, bytes in all)


def copy_verified(transport: Transport, local: Path, remote: str, sha256: str, *, told: Told | None = None) -> bool:
    """Make `remote` hold exactly the content with this hash; False where it already did.

    A reader on the device sees the old file or the whole new one.
    """
    return bool(copy_many(transport, {remote: (local, sha256)}, told=told))


def copy_many(
    transport: Transport, files: Mapping[str, tuple[Path, str]], *, told: Told | None = None
) -> tuple[str, ...]:
    """Make every remote path hold the content with its hash; gives the paths that did not before.

    The paths are all absolute or all relative. `told` hears of copies large enough to be waited for.
    """
    sizes = {remote: _size(local) for remote, (local, _) in files.items()}
    copied = missing = _find_missing(transport, files, sizes)
    for _ in range(2):  # a part that another host took away or damaged is sent once more
        if missing:
            missing = _find_missing(transport, _copy_parts(transport, missing, sizes, told), sizes)
    if not missing:
        return tuple(copied)
    (remote, (local, sha256)), *_ = missing.items()
    arrived = hash_remote(transport, remote)
    message = f"{local.name} did not arrive at {remote}: SHA-256 there is {arrived}, expected {sha256}"
    raise CommandFailed(message, hint="the local file changed or the copy was damaged: copy again")


def name_part(remote: str, sha256: str) -> str:
    """Name the file in which content on its way to `remote` is gathered; the same for every try and host."""
    folder, name = posixpath.split(remote)
    # File systems hold 255 bytes per name, of which a suffix of 22 is ours.
    return posixpath.join(folder, f"{name.encode()[:200].decode(errors='ignore')}.{sha256[:16]}.part")


def remove_old_parts(transport: Transport, folder: str, *, age_minutes: int = PARTS_AGE_MINUTES) -> None:
    """Remove what broken copies left below `folder` and nobody has gone on with since."""
    ours = ["(", "-name", _PART, "-o", "-name", f"{_PART}{_PIECE_SUFFIX}", ")"]
    old = ["-type", "f", "-mmin", f"+{age_minutes}"]
    run_checked(transport, ["find", _shield(folder), *old, *ours, "-exec", "rm", "-f", "--", "{}", "+"])


def send_pieces(
    transport: Transport,
    push: Callable[[Path, str], None],
    local: Path,
    remote: str,
    *,
    offset: int = 0,
    told: Callable[[int], None] | None = None,
) -> None:
    """Do what Transport.send promises over a way that can only push whole files: in pieces, appended on the device.

    A copy that breaks is resumed after its last whole piece.
    """
    with open_source(local) as source, TemporaryDirectory(prefix="rankship-") as folder:
        source.seek(offset)
        piece, sent = Path(folder) / local.name, offset
        while (content := source.read(PIECE_BYTES)) or sent == 0:
            piece.write_bytes(content)
            shutil.copymode(local, piece)  # a push may carry the rights along, as adb's does
            if sent == 0:
                push(piece, remote)
            else:
                _append(transport, push, piece, remote)
            sent += len(content)
            if told:
                told(sent)
            if not content:
                return


def _append(transport: Transport, push: Callable[[Path, str], None], piece: Path, remote: str) -> None:
    aside = f"{remote}{_PIECE_SUFFIX}"
    try:
        push(piece, aside)
        run_checked(transport, ["sh", "-c", APPEND, "sh", aside, remote], timeout_s=_limit_s(PIECE_BYTES))
    except PersistentTargetError:
        with suppress(TargetError):
            _remove(transport, [aside])
        raise


def _copy_parts(
    transport: Transport, files: Mapping[str, tuple[Path, str]], sizes: Mapping[str, int], told: Told | None
) -> dict[str, tuple[Path, str]]:
    """Send what is missing, and give those their name that arrived whole; gives the others.

    Where trying again cannot help, no part stays; where the link broke, all stay for the next try.
    """
    parts = {remote: name_part(remote, sha256) for remote, (_, sha256) in files.items()}
    folders = sorted({posixpath.dirname(remote) or "." for remote in files})
    for batch in make_batches(folders):
        run_checked(transport, ["mkdir", "-p", "--", *batch])
    try:
        begun = {remote: _begin(transport, files[remote][0], part, sizes[remote]) for remote, part in parts.items()}
        _check_room(
            transport, folders, [local for local, _ in files.values()], _sum_up(sizes, files) - sum(begun.values())
        )
        bar, done = _Bar(told, _sum_up(sizes, files)), 0
        for remote, (local, _) in files.items():
            bar.base_bytes = done
            transport.send(local, parts[remote], offset=begun[remote], told=bar.move)
            done += sizes[remote]
        arrived = hash_many(transport, list(parts.values()), timeout_s=_limit_s(done))
        whole = {remote for remote, (_, sha256) in files.items() if arrived.get(parts[remote]) == sha256}
        _rename(transport, [(parts[remote], remote) for remote in files if remote in whole])
        _remove(transport, [part for remote, part in parts.items() if remote not in whole])
    except PersistentTargetError:
        with suppress(TargetError):
            _remove(transport, list(parts.values()))
        raise
    return {remote: file for remote, file in files.items() if remote not in whole}


class _Bar:
    """Adds up the bytes of several files for one progress bar."""

    def __init__(self, told: Told | None, total_bytes: int) -> None:
        self.base_bytes = 0
        self._told = told if total_bytes >= SHOWN_FROM_BYTES else None
        self._total_bytes = total_bytes

    def move(self, sent_bytes: int) -> None:
        """Show how much of the current file is on its way."""
        if self._told:
            self._told(self.base_bytes + sent_bytes, self._total_bytes)


def _find_missing(
    transport: Transport, files: Mapping[str, tuple[Path, str]], sizes: Mapping[str, int]
) -> dict[str, tuple[Path, str]]:
    found = hash_many(transport, list(files), timeout_s=_limit_s(_sum_up(sizes, files))) if files else {}
    return {remote: (local, sha256) for remote, (local, sha256) in files.items() if found.get(remote) != sha256}


def _begin(transport: Transport, local: Path, part: str, size: int) -> int:
    """Tell how many bytes of a part are right; one that is wrong is removed."""
    if size < RESUMED_FROM_BYTES:
        return 0
    done = transport.run(["sh", "-c", LOOK, "sh", part], timeout_s=_limit_s(size))
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


def _check_room(transport: Transport, folders: Sequence[str], files: Sequence[Path], needed: int) -> None:
    folder = posixpath.commonpath(folders) or "."
    free = transport.free_bytes(folder)
    if free < needed:
        what = f"{files[0].name} needs" if len(files) == 1 else f"{len(files)} files need"
        message = f"{folder} has {show_bytes(free)} free, {what} {show_bytes(needed)}"
        raise NoSpace(message, hint="free space on the device or choose another workdir in the inventory")


def _rename(transport: Transport, pairs: Iterable[tuple[str, str]]) -> None:
    for batch in make_batches(pairs, "".join):
        words = [_shield(name) for pair in batch for name in pair]
        run_checked(transport, ["sh", "-c", RENAME, "sh", *words])


def _remove(transport: Transport, names: Sequence[str]) -> None:
    for batch in make_batches(names):
        run_checked(transport, ["rm", "-f", "--", *batch])


def _shield(name: str) -> str:
    """Keep a relative name that begins with a dash from being taken for an option."""
    return f"./{name}" if name.startswith("-") else name


def _limit_s(size: int) -> float:
    return STEP_TIMEOUT_S + size / _SLOWEST_BYTES_PER_S


def _sum_up(sizes: Mapping[str, int], files: Iterable[str]) -> int:
    return sum(sizes[remote] for remote in files)


def _size(local: Path) -> int:
    try:
        return local.stat().st_size
    except OSError as failure:
        raise InputError(f"cannot read {local}: {failure.strerror}", hint="the file to copy must exist") from None
