"""The artifact store: write-once folders, each named by the hash of everything that it was made from."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.files import hash_file, publish_folder
from rankship_pipeline.foundation.shared_store import SharedStore, find_shared

MANIFEST = "manifest.json"
_DAY_S = 24 * 60 * 60
_SHOWN = 20  # characters of a key in a folder's name: 80 bits, enough against accidental collision


def parse_folder(text: str) -> Path:
    """A folder of this machine; InputError for an address, which would become a folder of that name."""
    if "://" in text:
        raise InputError(
            f"{text} is an address, and this is a folder of this machine",
            hint="machines share a store by RANKSHIP_SHARED_STORE=ADDRESS; results are copied after their command",
        )
    return Path(text)


def default_root() -> Path:
    """The store's default folder: RANKSHIP_STORE, else rankship/store in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parse_folder(os.environ.get("RANKSHIP_STORE") or str(cache / "rankship" / "store"))


@dataclass(frozen=True)
class Entry:
    """One finished folder; its manifest holds the key's ingredients and every file's size and SHA-256."""

    folder: Path
    key: str
    files: dict[str, str]

    @property
    def content(self) -> str:
        """SHA-256 over the files' hashes; later stages depend on it, and not on how this entry was made."""
        return digest(self.files)

    def read(self, name: str) -> Path:
        """The path of one file, after checking that it has not changed since it was written."""
        path = self.folder / name
        if name not in self.files:
            raise BuildError(f"{self.folder} holds no {name}", hint=f"delete {self.folder}, it will be made again")
        if not path.is_file() or hash_file(path) != self.files[name]:
            raise BuildError(
                f"{path} was changed or cut short after it was written",
                hint=f"delete {self.folder}, it will be made again",
            )
        return path


@dataclass(frozen=True)
class Store:
    """A folder of entries `<kind>-<key>`; entries appear whole, in one rename, and are never changed.

    What is not there may be in a store that machines `shared`, and what is made is sent there.
    """

    root: Path
    shared: SharedStore | None = field(default_factory=find_shared)

    def find(self, kind: str, ingredients: Mapping[str, object]) -> Entry | None:
        """The finished entry made from these ingredients, None if there is none."""
        folder = self.root / self.name(kind, ingredients)
        return self.open(folder) if self._has(folder) else None

    def _has(self, folder: Path) -> bool:
        """Whether an entry is there, fetched if machines share it."""
        return folder.is_dir() or (self.shared is not None and self.shared.fetch(folder, MANIFEST))

    def name(self, kind: str, ingredients: Mapping[str, object]) -> str:
        """The folder's name for these ingredients."""
        return f"{kind}-{digest(dict(ingredients))[:_SHOWN]}"

    def produce(self, kind: str, ingredients: Mapping[str, object], make: Callable[[Path], None]) -> Entry:
        """Return the finished entry, or let `make` fill a private folder and publish it.

        A process killed inside `make` leaves only a hidden temporary folder that nothing reads.
        """
        found = self.find(kind, ingredients)
        if found is not None:
            return found
        key, folder = digest(dict(ingredients)), self.root / self.name(kind, ingredients)
        with publish_folder(folder) as temporary:
            make(temporary)
            files = {
                path.relative_to(temporary).as_posix(): hash_file(path)
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            manifest = {"kind": kind, "key": key, "ingredients": dict(ingredients), "files": files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        entry = self.open(folder)
        if self.shared is not None:
            self.shared.send(folder, list(entry.files), MANIFEST)
        return entry

    def keep_unfinished(self, kind: str, ingredients: Mapping[str, object]) -> Path:
        """A hidden folder where `make` saves its progress; `sweep` deletes it a day after its last change."""
        return self.root / f".{self.name(kind, ingredients)}.unfinished.tmp"

    def discard(self, entry: Entry) -> None:
        """Delete an entry; it is renamed first, so that no reader sees half of it."""
        hidden = self.root / f".{entry.folder.name}.{secrets.token_hex(4)}.tmp"
        entry.folder.rename(hidden)
        shutil.rmtree(hidden)
        if self.shared is not None:
            self.shared.discard(entry.folder)

    def holds(self, file: str) -> bool:
        """Whether a file of an entry is there, by its path from the store; one that machines share is fetched."""
        return self._has(self.root / Path(file).parts[0]) and (self.root / file).is_file()

    def sweep(self) -> None:
        """Delete the temporary folders of killed builds that are more than a day old."""
        for leftover in self.root.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # its owner may finish, or another sweep delete it, at any moment
                if time.time() - leftover.stat().st_mtime > _DAY_S:
                    shutil.rmtree(leftover, ignore_errors=True)

    def open(self, folder: Path) -> Entry:
        """Read an entry's manifest."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return Entry(folder=folder, key=manifest["key"], files=manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise BuildError(
                f"{folder} has no readable manifest", hint=f"delete {folder}, it will be made again"
            ) from None

    def match(self, kind: str, prefix: str) -> Entry:
        """The entry of a kind whose key starts with `prefix`; InputError unless exactly one does."""
        folders = sorted(self.root.glob(f"{kind}-{prefix[:_SHOWN]}*")) if prefix.isalnum() else []
        entries = [entry for entry in map(self.open, folders) if entry.key.startswith(prefix)]
        if len(entries) != 1:
            found = f"{len(entries)} entries match" if entries else "no entry matches"
            raise InputError(f"{found} {kind} {prefix!r} in {self.root}", hint="give a recipe, or more of the hash")
        return entries[0]
