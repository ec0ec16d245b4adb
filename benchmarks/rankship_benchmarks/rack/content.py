"""A host's files by content: each is fetched once, checked against its hash, and lent to errands as a hard link."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rankship_pipeline.foundation.errors import InputError, TargetError
from rankship_pipeline.foundation.files import hash_file

PART_BYTES = 4 << 20  # of one message
_KEPT_S = 30 * 24 * 3600
_HEX = 64


@dataclass(frozen=True)
class Content:
    """A folder of files that are named by their SHA-256."""

    folder: Path

    def list_missing(self, hashes: Iterable[str]) -> tuple[str, ...]:
        """Return those that are not here, each once."""
        return tuple(one for one in dict.fromkeys(hashes) if not self._locate(one).is_file())

    def add_part(self, sha256: str, sender: str, offset: int, data: bytes, size_bytes: int) -> None:
        """Write the next part of a file; with the last one, the file is checked and becomes visible.

        `sender` keeps apart those who bring the same file at once. TargetError if the content is not what was named.
        """
        path = self._locate(sha256)
        part = path.with_name(f".{sha256}.{_check_name(sender)}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if offset else "wb") as stream:
            stream.truncate(offset)
            stream.seek(offset)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if offset + len(data) < size_bytes:
            return
        found = hash_file(part)
        if found != sha256:
            part.unlink()
            raise TargetError(f"a file came as {found[:16]}…, not as {sha256[:16]}…", hint="run the same command again")
        part.replace(path)

    def lay_out(self, files: Mapping[str, str], root: Path) -> None:
        """Lay files out below a folder, by their paths there; what is there already stays."""
        for name, sha256 in files.items():
            target = root / _check_path(name)
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self._locate(sha256)
            if hash_file(source) != sha256:  # it was damaged here: the next errand fetches it again
                source.unlink()
                raise TargetError(f"{source} is damaged and was removed", hint="run the same command again")
            os.link(source, target)
            os.utime(source)

    def sweep(self) -> None:
        """Delete what no errand has used for a month."""
        for path in self.folder.rglob("*"):
            if path.is_file() and time.time() - path.stat().st_mtime > _KEPT_S:
                path.unlink(missing_ok=True)

    def _locate(self, sha256: str) -> Path:
        if len(sha256) != _HEX or not set(sha256) <= set("0123456789abcdef"):
            raise InputError(f"{sha256!r} is no SHA-256", hint="run the same release on every host of the rack")
        return self.folder / sha256[:2] / sha256


def _check_path(name: str) -> PurePosixPath:
    """Refuse a path that leads out of its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InputError(f"{name!r} leads out of the store", hint="run the same release on every host of the rack")
    return path


def _check_name(name: str) -> str:
    if not name.isalnum():
        raise InputError(f"{name!r} is no name", hint="run the same release on every host of the rack")
    return name
