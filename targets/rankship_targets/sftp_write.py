"""A file written over SFTP with many requests under way, each answer read and believed."""

from collections.abc import Callable
from typing import BinaryIO

import paramiko

_REQUEST_BYTES = 1 << 15  # every server takes this much at once
_OPENSSH_REQUEST_BYTES = 1 << 17  # OpenSSH takes twice this; fewer requests cost less
_REQUESTS_PER_READ = 8


def write_rest(
    source: BinaryIO,
    target: paramiko.SFTPFile,
    offset: int,
    told: Callable[[int], None] | None = None,
    *,
    openssh: bool = False,
) -> None:
    """Write what follows `offset` in `source` to the same place in `target`; OSError where not all of it is there."""
    source.seek(offset)
    target.seek(offset)
    target.set_pipelined(True)
    target.MAX_REQUEST_SIZE = _OPENSSH_REQUEST_BYTES if openssh else _REQUEST_BYTES
    while chunk := source.read(target.MAX_REQUEST_SIZE * _REQUESTS_PER_READ):
        target.write(chunk)
        if told:
            told(source.tell())
    # The server answers in order: when it has told the size, every write before has been answered too.
    size = target.stat().st_size
    if size != source.tell():
        raise OSError(f"the device holds {size} of {source.tell()} bytes")
