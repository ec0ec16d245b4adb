"""A kit's lock, which lists every file by its hash and so gives the kit its name; and where this host keeps kits."""

import zipfile
from pathlib import Path

from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.foundation.files import hash_file, publish_folder, write_atomic
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import user_folder
from rankship_targets.kit.system import Board, Phone

_NAME_CHARACTERS = 16


@record
class KitFile:
    """One file of a kit; `unpacked_bytes` is its size once unpacked on the device."""

    name: str
    size_bytes: int
    unpacked_bytes: int
    sha256: str


@record
class KitLock:
    """All files of a kit, and the system that it is for; `runtimes` are format → (name, version)."""

    system: Board | Phone
    runtimes: dict[Format, tuple[str, str]]
    files: tuple[KitFile, ...]

    @property
    def name(self) -> str:
        """The kit's name: the beginning of its lock's hash."""
        return digest(self)[:_NAME_CHARACTERS]


def describe_file(path: Path, unpacked_bytes: int | None = None) -> KitFile:
    """Describe a file of a kit; for a zip archive (a wheel), the unpacked size is read from it by default."""
    if unpacked_bytes is None:
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    return KitFile(name=path.name, size_bytes=size, unpacked_bytes=unpacked_bytes, sha256=hash_file(path))


def kits_folder() -> Path:
    """Return where this host keeps the kits that it built; the folder may be deleted at any time."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "rankship" / "kits"


def keep_kit(lock: KitLock, folder: Path, device: str) -> Path:
    """Keep a kit's files and lock under its name, and record it as the latest for `device`."""
    home = kits_folder() / lock.name
    if not home.is_dir():
        with publish_folder(home) as kept:
            for file in lock.files:
                (folder / file.name).rename(kept / file.name)
            (kept / "lock.json").write_text(encode(lock), encoding="utf-8")
    write_atomic(kits_folder() / "for" / device, lock.name.encode())
    return home


def find_kit(device: str) -> tuple[KitLock, Path]:
    """Return lock and folder of the kit that was last built for a device; BuildError if there is none."""
    note = kits_folder() / "for" / device
    name = note.read_text(encoding="utf-8") if note.is_file() else None
    if name is None or not (kits_folder() / name / "lock.json").is_file():
        raise BuildError(
            f"no kit was built for {device}", hint=f"run {show_command('rankship', 'kit', 'build', device)}"
        )
    folder = kits_folder() / name
    lock = decode(KitLock, (folder / "lock.json").read_text(encoding="utf-8"), where=str(folder / "lock.json"))
    return lock, folder
