"""One command that receives a file on the device: it hashes the content, compares, and only then renames the file.

If the device has Python, it hashes while the bytes arrive; otherwise the shell hashes the file afterwards. The content
is flushed to disk before the renaming, and the new name before the command ends: after a power cut, a file that was
reported as arrived is there, and no name belongs to a file without its content.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from rankship_pipeline.foundation.errors import CommandFailed, ConnectionLost
from rankship_targets.transport.protocol import SIGNALLED, STEP_TIMEOUT_S, Transport, name_refusal

SLOWEST_LINK_BYTES_PER_S = 500_000  # a poor wireless network; slower than this counts as hung
SLOWEST_DISK_BYTES_PER_S = 5_000_000  # a worn SD card, read or hashed
PYTHON_FROM_BYTES = 1 << 22  # hashing a smaller file takes less time than starting the interpreter
# Every byte is written at its own offset and nothing is truncated before the end: a receiver that outlives its
# connection, or another host's receiver, writes the same bytes at the same offsets of this part.
_RECEIVER = """
import hashlib, os, sys
part, offset, expected, place, folder = sys.argv[1], int(sys.argv[2]), *sys.argv[3:6]
known, block, fresh = hashlib.sha256(), memoryview(bytearray(1 << 18)), 0
try:
    file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    for size in iter(lambda: os.readv(file, [block[:offset]]), 0):
        known.update(block[:size])
        offset -= size
    for size in iter(lambda: os.readv(0, [block]), 0):
        known.update(block[:size])
        rest = block[:size]
        while rest:
            rest = rest[os.write(file, rest):]
        fresh += size
        if fresh >= 1 << 23:  # makes the disk write while more bytes arrive, instead of all at the end
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            fresh = 0
    if known.hexdigest() == expected:
        os.ftruncate(file, os.lseek(file, 0, os.SEEK_CUR))
        os.fsync(file)
        os.replace(part, place)
        os.fsync(os.open(folder, os.O_RDONLY))
    print(known.hexdigest())
except OSError as failure:
    sys.exit(f"{failure.filename or part}: {failure.strerror}")
"""
# Arguments: the part, its bytes that are right, the hash of the whole, the target, its folder, the receiver or "".
RECEIVE = (
    "LC_ALL=C; export LC_ALL; "
    'if [ -d "$4" ]; then echo "$4: Is a directory" >&2; exit 1; fi; '
    'if [ -n "$6" ] && command -v python3 >/dev/null; then python3 -I -S -c "$6" "$@"; code=$?; '
    "case $code in 126|127) ;; *) exit $code ;; esac; fi; "  # a Python that does not start has read nothing
    'if [ "$2" = 0 ]; then cat > "$1"; else cat >> "$1"; fi || exit; '
    # Another host may have renamed the part meanwhile: then the hash is that of nothing, and the caller checks again.
    'sum=$(sha256sum < "$1" || sha256sum < /dev/null); sum=${sum%% *}; '
    # A `sync` that takes no names (toybox) flushes everything.
    'if [ "$sum" = "$3" ]; then sync -- "$1" && mv -f -- "$1" "$4" && sync -- "$5" || exit; fi; echo "$sum"'
)


def receive(
    transport: Transport,
    local: Path,
    part: str,
    *,
    offset: int,
    sha256: str,
    place: str,
    on_progress: Callable[[int], None] | None = None,
) -> str:
    """Send the bytes from `offset` on to `part` and, if the hash of the whole is right, rename it to `place`.

    Returns the SHA-256 (hex) of what arrived. ConnectionLost if the receiver on the device was killed.
    """
    size = local.stat().st_size
    receiver = _RECEIVER if size >= PYTHON_FROM_BYTES else ""
    argv = ["sh", "-c", RECEIVE, "sh", part, str(offset), sha256, place, posixpath.dirname(place) or ".", receiver]
    done = transport.feed(argv, local, offset=offset, timeout_s=limit_copy_s(size), on_progress=on_progress)
    what = f"copying {local.name} to {place}"
    if done.code > SIGNALLED:
        raise ConnectionLost(f"{what}: the receiver on the device was killed", hint="`dmesg` there may say why")
    if done.code != 0:
        raise name_refusal(f"{what}: {done.stderr.strip()}", hint="check that the path exists and is writable")
    found = re.fullmatch(r"([0-9a-f]{64})\s*", done.stdout)
    if not found:
        message = f"{what}: the device printed {done.stdout[-200:]!r}, expected a hash"
        raise CommandFailed(message, hint="check the device's `sha256sum`")
    return found[1]


def limit_hash_s(size_bytes: int) -> float:
    """Return the longest time that a device may take to hash this many bytes."""
    return STEP_TIMEOUT_S + size_bytes / SLOWEST_DISK_BYTES_PER_S


def limit_copy_s(size_bytes: int) -> float:
    """Return the longest time that this many bytes may take to arrive and be hashed."""
    return limit_hash_s(size_bytes) + size_bytes / SLOWEST_LINK_BYTES_PER_S
