"""A store that several machines share: a bucket or a folder, by an address that fsspec knows (s3://, gs://, sftp://).

A machine works on its own store. What that lacks is fetched from the shared one, and what it makes is sent there. An
entry's manifest is sent last, so that an entry without one is not there yet.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file, publish_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

VARIABLE = "RANKSHIP_SHARED_STORE"


class SharedStore:
    """The entries at one address; every failure to reach it is an InputError that names the variable."""

    def __init__(self, address: str) -> None:
        self._address = address

    def fetch(self, folder: Path, manifest: str) -> bool:
        """Fetch the entry of a folder's name into that folder, which appears whole; False if there is none.

        A file whose hash is not that of the manifest, as while another machine sends the same entry, means none.
        """
        with self._open() as (files, root):
            place = f"{root}/{folder.name}"
            if not files.exists(f"{place}/{manifest}"):
                return False
            text = files.cat_file(f"{place}/{manifest}")  # once: another machine may send it anew
            hashes = json.loads(text)["files"]
            with suppress(_Unfinished), publish_folder(folder) as temporary:
                for name in hashes:
                    target = temporary / _refuse_outside(name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    files.get_file(f"{place}/{name}", str(target))
                if any(hash_file(temporary / name) != sha256 for name, sha256 in hashes.items()):
                    raise _Unfinished
                (temporary / manifest).write_bytes(text)
        return folder.is_dir()

    def send(self, folder: Path, names: Sequence[str], manifest: str) -> None:
        """Send a finished entry's files and then its manifest, unless the entry is there."""
        with self._open() as (files, root):
            place = f"{root}/{folder.name}"
            if files.exists(f"{place}/{manifest}"):
                return
            for name in [*names, manifest]:
                files.makedirs(str(PurePosixPath(f"{place}/{name}").parent), exist_ok=True)
                files.put_file(str(folder / name), f"{place}/{name}")

    def discard(self, folder: Path) -> None:
        """Delete the entry of a folder's name, if it is there."""
        with self._open() as (files, root):
            if files.exists(f"{root}/{folder.name}"):
                files.rm(f"{root}/{folder.name}", recursive=True)

    @contextmanager
    def _open(self) -> "Iterator[tuple[AbstractFileSystem, str]]":
        import fsspec

        try:
            files, root = fsspec.core.url_to_fs(self._address)
            yield files, root.rstrip("/")
        except ImportError as failure:  # fsspec's own package for this kind of address
            message = f"{VARIABLE}={self._address}: {failure}"
            raise InputError(message, hint="install it, or unset the variable") from None
        except Exception as failure:  # every file system has errors of its own
            message = f"{VARIABLE}={self._address} cannot be used: {type(failure).__name__}: {failure}"
            raise InputError(message, hint="check the address and your access, or unset the variable") from failure


class _Unfinished(Exception):
    """Ends the fetching of an entry that is not whole."""


def find_shared() -> SharedStore | None:
    """The store at the address in RANKSHIP_SHARED_STORE; None where it is not set."""
    address = os.environ.get(VARIABLE)
    return SharedStore(address) if address else None


def _refuse_outside(name: str) -> PurePosixPath:
    """A file's name in an entry; ValueError for one that would be written elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        message = f"an entry names the file {name!r}, outside its folder"
        raise ValueError(message)
    return path
