"""One command that takes a file in: what comes is hashed on the device, compared, and only then given its name.

Where the device has a Python, it hashes while the bytes come; elsewhere its shell hashes what lies there afterwards.
Content is on the disk before it has its name, and the name before the command ends: what was said to have arrived is
there after a power cut, and a name never stands for a file without its content.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from rankship_pipeline.foundation.errors import CommandFailed, ConnectionLost
from rankship_targets.transport.protocol import SIGNALLED, STEP_TIMEOUT_S, Transport, name_refusal

SLOWEST_LINK_BYTES_PER_S = 500_000  # a poor wireless link; slower than this counts as hung
SLOWEST_DISK_BYTES_PER_S = 5_000_000  # a worn SD card, read or hashed
PYTHON_FROM_BYTES = 1 << 22  # of a smaller file the hash takes less time than an interpreter's start
# Every byte goes to its own place and nothing is cut off before the end: a receiver of a broken link that lives on, or
# another host's, writes the same bytes to the same places of this part.
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
        if fresh >= 1 << 23:  # the disk writes while the link brings more, instead of all of it at the end
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
# Words: the part, how much of it is right, the hash of the whole, its name, the name's folder, the receiver or nothing.
RECEIVE = (
    "LC_ALL=C; export LC_ALL; "
    'if [ -d "$4" ]; then echo "$4: Is a directory" >&2; exit 1; fi; '
    'if [ -n "$6" ] && command -v python3 >/dev/null; then python3 -I -S -c "$6" "$@"; code=$?; '
    "case $code in 126|127) ;; *) exit $code ;; esac; fi; "  # one that does not start has taken nothing
    'if [ "$2" = 0 ]; then cat > "$1"; else cat >> "$1"; fi || exit; '
    # Of a part that another host gave its name meanwhile, nothing is left: the caller looks again.
    'sum=$(sha256sum < "$1" || sha256sum < /dev/null); sum=${sum%% *}; '
    # A `sync` that knows no names (toybox) writes out everything.
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
    """Send what follows `offset` to the end of `part`, and have it renamed to `place` where its hash is right.

    Gives the SHA-256 (hex) of what arrived. ConnectionLost where the device's end was killed.
    """
    size = local.stat().st_size
    receiver = _RECEIVER if size >= PYTHON_FROM_BYTES else ""
    argv = ["sh", "-c", RECEIVE, "sh", part, str(offset), sha256, place, posixpath.dirname(place) or ".", receiver]
    done = transport.feed(argv, local, offset=offset, timeout_s=limit_copy_s(size), on_progress=on_progress)
    what = f"copying {local.name} to {place}"
    if done.code > SIGNALLED:
        raise ConnectionLost(f"{what}: the device's end was killed", hint="see what ends processes there: `dmesg`")
    if done.code != 0:
        raise name_refusal(f"{what}: {done.stderr.strip()}", hint="check that the path exists and may be written")
    found = re.fullmatch(r"([0-9a-f]{64})\s*", done.stdout)
    if not found:
        message = f"{what}: the device said {done.stdout[-200:]!r}, expected a hash"
        raise CommandFailed(message, hint="what is `sha256sum` there?")
    return found[1]


def limit_hash_s(size_bytes: int) -> float:
    """Give the longest that a device may take to hash so much."""
    return STEP_TIMEOUT_S + size_bytes / SLOWEST_DISK_BYTES_PER_S


def limit_copy_s(size_bytes: int) -> float:
    """Give the longest that so much may be on its way and be hashed there."""
    return limit_hash_s(size_bytes) + size_bytes / SLOWEST_LINK_BYTES_PER_S
