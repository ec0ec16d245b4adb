"""The archive that Linux unpacks as its first file system (cpio, format "newc", compressed)."""

import gzip
import stat
from collections.abc import Mapping

_MAGIC = "070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 4


def pack_initramfs(folders: list[str], files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """Pack folders and files (name → content, permissions); a folder must come before what it contains."""
    entries = [(name, b"", stat.S_IFDIR | 0o755) for name in folders]
    entries += [(name, content, stat.S_IFREG | rights) for name, (content, rights) in files.items()]
    entries.append((_TRAILER, b"", 0))
    packed = b"".join(_pack_entry(*entry, number=number) for number, entry in enumerate(entries, start=1))
    return gzip.compress(packed, compresslevel=1, mtime=0)


def _pack_entry(name: str, content: bytes, mode: int, *, number: int) -> bytes:
    title = name.encode() + b"\0"
    links = 1
    # inode, mode, user, group, links, time, size, device ×2, special device ×2, length of the name, checksum
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(title), 0)
    head = _MAGIC.encode() + b"".join(f"{field:08x}".encode() for field in fields)
    return _pad(head + title) + _pad(content)


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _BLOCK)
