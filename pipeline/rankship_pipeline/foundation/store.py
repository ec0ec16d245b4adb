"""The artifact store: write-once folders addressed by the hash of everything that went into them."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.errors import BuildError, InputError
from rankship_pipeline.foundation.files import hash_file, publish_folder

MANIFEST = "manifest.json"
_DAY_S = 24 * 60 * 60
_SHOWN = 20  # characters of a key in a folder's name: 80 bits, no accidental collision


def default_root() -> Path:
    """RANKSHIP_STORE, else rankship/store in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RANKSHIP_STORE") or cache / "rankship" / "store")


@dataclass(frozen=True)
class Entry:
    """One finished folder; its manifest holds the key's ingredients and every file's size and SHA-256."""

    folder: Path
    key: str
    files: dict[str, str]

    @property
    def content(self) -> str:
        """SHA-256 over the files themselves: what later stages are made from, whatever made this one."""
        return digest(self.files)

    def read(self, name: str) -> Path:
        """The path of one file, after checking that it still is what was written."""
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
    """A folder of entries `<kind>-<key>`; entries appear whole, in one rename, and are never changed."""

    root: Path

    def find(self, kind: str, ingredients: Mapping[str, object]) -> Entry | None:
        """The entry made from these ingredients, if it is finished."""
        folder = self.root / self.name(kind, ingredients)
        return self.open(folder) if folder.is_dir() else None

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
        return self.open(folder)

    def keep_unfinished(self, kind: str, ingredients: Mapping[str, object]) -> Path:
        """A hidden folder for what lets `make` go on after a kill; `sweep` takes it a day after its last change."""
        return self.root / f".{self.name(kind, ingredients)}.unfinished.tmp"

    def discard(self, entry: Entry) -> None:
        """Take an entry away, in one rename first, so that nobody reads half of it."""
        grave = self.root / f".{entry.folder.name}.{secrets.token_hex(4)}.tmp"
        entry.folder.rename(grave)
        shutil.rmtree(grave)

    def sweep(self) -> None:
        """Remove what killed builds left behind more than a day ago."""
        for leftover in self.root.glob(".*.tmp"):
            with suppress(FileNotFoundError):  # its owner may finish, or another sweep take it, at any moment
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
        """The one entry of a kind whose key starts with `prefix`."""
        folders = sorted(self.root.glob(f"{kind}-{prefix[:_SHOWN]}*")) if prefix.isalnum() else []
        entries = [entry for entry in map(self.open, folders) if entry.key.startswith(prefix)]
        if len(entries) != 1:
            found = f"{len(entries)} entries match" if entries else "no entry matches"
            raise InputError(f"{found} {kind} {prefix!r} in {self.root}", hint="give a recipe, or more of the hash")
        return entries[0]
